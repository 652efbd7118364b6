"""scale-guide evaluate RUN: scores of the target of a finished run, or of a running one's newest checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from scale_guide.build import build_network, build_task
from scale_guide.checkpoint import load_target
from scale_guide.commands import user_errors
from scale_guide.engine import Engine
from scale_guide.evaluate import evaluate
from scale_guide.recipe import load_recipe


def main(arguments: Sequence[str]) -> int:
    """Prints the scores as JSON; returns 0."""
    parser = ArgumentParser(prog="scale-guide evaluate")
    parser.add_argument("run", type=str, help="Run folder.")
    run_dir = Path(parser.parse_args(list(arguments)).run)
    with user_errors():
        recipe = load_recipe(run_dir)
        engine = Engine(timeout_s=recipe.training.timeout_s)
        task = build_task(recipe)
        target = build_network("target", recipe, task)
        source = load_target(target, run_dir)
    target.to(engine.device)
    rows = math.ceil(recipe.training.batch_size / engine.world_size)
    rows = recipe.training.micro_batch_size or rows
    scores = evaluate(target, task, engine, micro_batch_size=rows, num_workers=recipe.training.num_workers)
    if engine.is_main:
        print(json.dumps({"run": str(run_dir), "weights": source, **scores}))
    engine.close()
    return 0
