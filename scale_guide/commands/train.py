"""scale-guide train: train the target of a recipe, or its variants one after another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scale_guide.build import (
    build_guide,
    build_network,
    build_task,
    check_guide,
    check_outputs,
    trace_recipe,
)
from scale_guide.commands import user_errors
from scale_guide.config import Recipe
from scale_guide.engine import Engine
from scale_guide.recipe import Option, check_guide_weights, read_recipe, variants
from scale_guide.run import Run
from scale_guide.schedule import describe

ONLY = Option("", "Train these variants alone, in the recipe's order: names with commas between. Empty: all of them.")


def main(arguments: Sequence[str]) -> int:
    """Trains; returns 0, also when asked to stop (the state is then saved)."""
    with user_errors():
        recipe, chosen = read_recipe("train", arguments, {"only": ONLY})
        recipes = variants(recipe, only=chosen["only"])
        check_guide_weights(recipes, recipe.variants)
        engine = Engine(timeout_s=recipe.training.timeout_s, trackers=recipe.trackers, logging_dir=recipe.run_dir)
    folder, stopped = Path(recipe.run_dir), False
    for name, variant in recipes.items():
        stopped = not _train_one(name or folder.name, variant, engine)
        if stopped:
            break
        engine.free()
    if engine.is_main and not stopped:
        from scale_guide.analysis import report  # it draws: a second to import, and needed on one rank alone

        print("\n" + (report.write([folder], folder) if len(recipes) > 1 else str(report.read([folder]))), flush=True)
    engine.close()
    return 0


def _train_one(label: str, recipe: Recipe, engine: Engine) -> bool:
    """Returns whether the run is complete (False: it was asked to stop)."""
    with user_errors():
        run = set_up(recipe, engine)
        finished = run.finished()
        if finished is None:
            run.prepare()
    if finished is not None:
        if engine.is_main:
            print(f"{label}  already finished in {recipe.run_dir}: nothing to do", flush=True)
        return True
    if engine.is_main:
        print(f"{label}  {_describe(run)}", flush=True)
    return run.run(label) is not None


def set_up(recipe: Recipe, engine: Engine) -> Run:
    """Returns the run, checked but not prepared.

    Raises:
        ValueError: anything in the recipe that cannot work, alike on every rank.
    """
    task = build_task(recipe)
    layers = trace_recipe(recipe, task)
    check_outputs(recipe, task)
    guide = None
    if recipe.guidance.needs_guide:
        with engine.building_whole():
            guide = build_guide(recipe, task, engine.device)
            check_guide(guide, recipe, task, layers)
    target = engine.build(lambda: build_network("target", recipe, task))
    return Run(recipe, task=task, target=target, guide=guide, layers=layers, engine=engine)


def _describe(run: Run) -> str:
    recipe, engine = run.recipe, run.engine
    guided = "unguided"
    if run.guide is not None:
        how = [f"guided by {recipe.guide.name} in {len(run.layers.pairs)} pairs"] * bool(recipe.guidance.weight)
        how += [f"distilled from {recipe.guide.name}'s logits"] * bool(recipe.guidance.distillation)
        fed = {"data": "", "noise": ", fed noise", "shuffled": ", fed shuffled rows"}[recipe.guide.input]
        guided = " and ".join(how) + fed + describe(recipe.guidance)
    processes = "1 process" if engine.world_size == 1 else f"{engine.world_size} processes"
    passes = "" if run.num_micro_batches == 1 else f" x {run.num_micro_batches} micro-batches"
    return (
        f"{recipe.target.name} {guided}; {run.num_steps} steps of {recipe.training.batch_size} rows = "
        f"{processes}{passes} x {run.micro_batch_size}; {engine.name} on {engine.device.type}; "
        f"run folder {recipe.run_dir}"
    )
