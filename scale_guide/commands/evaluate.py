"""scale-guide evaluate RUN: scores of the target of a finished run, or of a running one's newest checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser
from safetensors.torch import load_file
from torch import Tensor, nn

from scale_guide.build import build_network, build_task
from scale_guide.checkpoint import step_of, whole_checkpoints
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


def load_target(target: nn.Module, run_dir: Path) -> str:
    """Loads the weights of a run into its target; returns where they came from.

    Raises:
        ValueError: neither finished weights nor a whole checkpoint.
    """
    finished = run_dir / "target" / "model.safetensors"
    checkpoints = whole_checkpoints(run_dir)
    if (run_dir / "summary.json").exists() and finished.exists():
        state, source = load_file(finished), str(finished)
    elif checkpoints:
        state, source = _checkpoint_weights(checkpoints[-1]), f"{checkpoints[-1]} (step {step_of(checkpoints[-1])})"
    else:
        raise ValueError(f"RUN={str(run_dir)!r} holds neither finished weights nor a whole checkpoint yet.")
    target.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return source


def _checkpoint_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="pytorch_model")
    return weights
