"""Run folders as a training leaves them, made in milliseconds: for the tests of what reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from scale_guide.config import Recipe
from scale_guide.recipe import read_recipe, variants
from scale_guide.tracking import RunFolder

PAIRS = [(f"hidden.{i}.linear", f"layer{i}.conv") for i in range(5)]


def recipe(variant: str, *options: str, name: str = "", seed: int = 0) -> Recipe:
    """The quickstart's recipe for one variant."""
    own = [*options, "--training.seed", str(seed), *(["--name", name] if name else [])]
    return variants(read_recipe("train", ["--config", "quickstart", *own])[0])[variant]


def lines(num_steps: int, *, guided: bool, seed: int = 0, every: int = 10) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl as run.py writes them: two of training, then one of validation."""
    found: list[dict[str, Any]] = []
    for step in range(every, num_steps + 1, every):
        loss = 2.3 * math.exp(-step / (300 if guided else 900)) + 0.02 * seed
        line = {"step": step, "epoch": step / 5, "learning_rate": 0.001, "task_loss": loss, "rows_per_s": 900.0}
        if guided:
            pairs = {
                f"{target} <- {guide}": {
                    "similarity": (1 - math.exp(-step / 200)) * (0.95 - 0.1 * i),
                    "debiased": (1 - math.exp(-step / 200)) * (0.93 - 0.1 * i),
                    "floor": 0.04 + 0.01 * i,
                }
                for i, (target, guide) in enumerate(PAIRS)
            }
            mean = sum(pair["similarity"] for pair in pairs.values()) / len(pairs)
            line |= {"guidance_loss": 5 * (1 - mean), "similarity": mean, "pairs": pairs, "guidance_seconds": 0.07}
            line |= {"gradient_norm_at_activations": 0.03 / step, "upper_gradient_norm_at_activations": 0.2 / step}
        found.append({**line, "seconds": step * 0.1})
        if step % (2 * every) == 0:
            found.append({"step": step, "seconds": step * 0.1, "validation": scores(loss)})
    return found


def scores(loss: float) -> dict[str, float]:
    """Validation scores that go with a training loss."""
    return {"loss": loss + 0.1, "accuracy": math.exp(-loss)}


def make(
    path: Path,
    made: Recipe,
    *,
    num_steps: int = 100,
    finished: bool = True,
    started: str = "2026-01-01T00:00:00+0000",
    metrics: list[dict[str, Any]] | None = None,
    validation: Mapping[str, float] | None = None,
) -> Path:
    """Makes a run folder; returns it."""
    folder = RunFolder(path, writes=True)
    folder.start(made, {"started": started, "device": "cpu", "commit": "0123456789abcdef"}, {}, 0)
    own = lines(num_steps, guided=made.guidance.needs_guide, seed=made.training.seed) if metrics is None else metrics
    for line in own:
        folder.log(line)
    if finished:
        found = validation or next((line["validation"] for line in reversed(own) if "validation" in line), {})
        summary = {"finished": True, "step": num_steps, "score": "accuracy", "validation": found}
        folder.finish(summary, {"weight": torch.zeros(1)}, {})
    return path


def quickstart(path: Path, *, seeds: int = 1) -> Path:
    """Makes the folders of the quickstart over some seeds; returns the folder of all of them."""
    for seed in range(seeds):
        for minute, variant in enumerate(("unguided", "guided")):
            folder = path / f"seed_{seed}" / variant if seeds > 1 else path / variant
            make(folder, recipe(variant, seed=seed), started=f"2026-01-01T00:0{minute}:00+0000")
    return path


def add_maps(run: Path) -> None:
    """Writes maps.json as `scale-guide similarity RUN` does."""
    targets, guides = ([name for name, _ in PAIRS], [name for _, name in PAIRS])
    before = [[0.2 for _ in guides] for _ in targets]
    after = [[0.9 if i == j else 0.3 for j in range(len(guides))] for i in range(len(targets))]
    maps = {"target_layers": targets, "guide_layers": guides, "before": before, "after": after, "num_rows": 1024}
    (run / "maps.json").write_text(json.dumps(maps))
