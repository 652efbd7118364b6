"""The measured side of check_parity.py, under `accelerate launch`: the product's own engine, guidance and step."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from parity_cases import RECIPES, step_batches
from torch import Tensor

from scale_guide import trainer
from scale_guide.build import build_network, build_task
from scale_guide.config import Recipe
from scale_guide.engine import Engine
from scale_guide.guidance import Guidance
from scale_guide.guide import Guide
from scale_guide.reading import Draws
from scale_guide.statistics import Statistics
from scale_guide.tasks import Task

BUGS_OF_PROCESSES = ("world", "centre", "count")
BUGS = (*BUGS_OF_PROCESSES, "masks", "running")
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class WatchedEngine(Engine):
    """An engine that notes how many gradient elements stay on a rank between the micro-batches of a step."""

    kept_elements = 0

    def backward(self, loss: Tensor) -> None:
        """As the engine's own."""
        super().backward(loss)
        if not self.accelerator.sync_gradients:
            kept = sum(p.grad.numel() for p in self._model.parameters() if p.grad is not None)
            self.kept_elements = max(self.kept_elements, kept)


def plant(bug: str) -> None:
    """Replaces a part of the product in this process by one with the bug."""
    if bug == "world":
        _scale_home_gradients()
    elif bug == "centre":
        _centre_on_each_rank()
    elif bug == "count":
        _divide_by_local_count()
    elif bug == "masks":
        _draw_other_masks_first()
    elif bug == "running":
        trainer.paused = lambda _: contextlib.nullcontext()


def _scale_home_gradients() -> None:
    right = Statistics.rows_gradient

    def rows_gradient(self: Statistics, *args: Any, **kwargs: Any) -> Tensor:
        return right(self, *args, **kwargs) / self._wires.size

    Statistics.rows_gradient = rows_gradient  # type: ignore[method-assign]


def _centre_on_each_rank() -> None:
    right_guide, right_target = Statistics.add_guide, Statistics.add_target
    right_gradient = Statistics.rows_gradient

    def centred(rows: Mapping[str, Tensor], weights: Tensor | None) -> dict[str, Tensor]:
        keep = slice(None) if weights is None else weights > 0
        return {name: value - value[keep].mean(0) for name, value in rows.items()}

    def add_guide(self: Statistics, guide: Any, weights: Tensor | None = None, **kwargs: Any) -> None:
        right_guide(self, centred(guide, weights), weights, **kwargs)

    def add_target(self: Statistics, target: Any, guide: Any, weights: Tensor | None = None, **kwargs: Any) -> None:
        right_target(self, centred(target, weights), centred(guide, weights), weights, **kwargs)

    def rows_gradient(self: Statistics, j: int, layer: str, x: Tensor, guide: Any, weights: Any) -> Tensor:
        return right_gradient(self, j, layer, centred({"": x}, weights)[""], centred(guide, weights), weights)

    Statistics.add_guide, Statistics.add_target = add_guide, add_target  # type: ignore[method-assign]
    Statistics.rows_gradient = rows_gradient  # type: ignore[method-assign]


def _divide_by_local_count() -> None:
    right = trainer._agree

    def agree(micro_batches: Any, task: Any, engine: Engine, stop: bool) -> Tensor:
        totals = right(micro_batches, task, engine, stop)
        totals[0] = engine.world_size * sum(float(task.count(batch)) for batch in micro_batches)
        return totals

    trainer._agree = agree


def _draw_other_masks_first() -> None:
    right = Draws.seed_of

    def seed_of(self: Draws, j: int, *stream: int) -> int:
        first_pass = not torch.is_grad_enabled()
        return right(self, j, *stream) + first_pass

    Draws.seed_of = seed_of  # type: ignore[method-assign]


def measure(
    recipe: Recipe, task: Task, engine: WatchedEngine, *, layout: Any, k: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Returns the losses and final tensors of one training, and what was seen on the way. Collective."""
    target = engine.build(lambda: build_network("target", recipe, task).to(dtype))
    with engine.building_whole():
        guide = build_network("guide", recipe, task).to(dtype)
    prepared = engine.prepare(
        target,
        trainer.make_optimizer(recipe.optimizer, target),
        micro_batch_size=recipe.training.batch_size // (engine.world_size * k),
    )
    guidance = Guidance(
        engine.unwrap(prepared),
        Guide(guide, dtype=recipe.guide.dtype if dtype == torch.float32 else "auto", device=engine.device),
        pairs=recipe.guidance.pairs,
        target_layers=recipe.target.layers,
        guide_layers=recipe.guide.layers,
        rows=recipe.guidance.rows,
        layout=layout,
        num_micro_batches=k,
    )
    engine.kept_elements = 0
    losses = []
    for step, batches in enumerate(step_batches(recipe, task, rank=engine.rank, world_size=engine.world_size, k=k)):
        log = trainer.guided_step(batches, target=prepared, task=task, engine=engine, guidance=guidance, step=step)
        assert log.guidance_loss is not None
        assert log.task_sum is not None
        losses.append(float(engine.sum(log.task_sum) / log.count + log.guidance_loss))
    final = {name: value.double() for name, value in engine.state_dict().items()}
    kept = max(engine.gather_list([engine.kept_elements]))
    guidance.close()
    engine.free()
    return {"losses": losses, "final": final, "kept": kept}


def main() -> None:
    """Runs every case of the job file named on the command line and writes the results beside it."""
    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    # A fair comparison with float64: no TF32 in the target's or the guide's own convolutions and products.
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    engine = WatchedEngine(timeout_s=300)
    found = (engine.name, engine.world_size, engine.device.type)
    if found != (job["engine"], job["processes"], job["device"]):
        raise RuntimeError(f"the launch gave {found}, not {job['engine'], job['processes'], job['device']}")
    plant(job["bug"])
    tasks = {name: build_task(RECIPES[name]) for name in dict.fromkeys(name for name, *_ in job["cases"])}
    results = []
    for name, layout, k in job["cases"]:
        if engine.is_main:
            print(f"parity: {name} {layout} k={k}", flush=True)
        result = measure(RECIPES[name], tasks[name], engine, layout=layout, k=k, dtype=DTYPES[job["dtype"]])
        results.append({"task": name, "layout": layout, "k": k, **result})
    if engine.is_main:
        torch.save(results, path.with_suffix(".pt"))
    engine.close()


if __name__ == "__main__":
    main()
