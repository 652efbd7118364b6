"""A run goes on with another number of processes: same parameters and moments, so the same weights at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import finish, start
from safetensors.torch import load_file

from scale_guide.tracking import read_metrics

# Dropout follows the number of a micro-batch of 16 rows, whichever process has it. No BatchNorm: before it a bias has
# no gradient but rounding, which Adam makes as large as any other.
RECIPE = """
task: {name: "toy:build"}
target: {name: deep_fcn, options: {depth: 3, first_width: 23, width: 21, dropout: 0.2, batch_norm: false}}
guide: {name: deep_fcn, options: {depth: 2, first_width: 24, width: 24, batch_norm: false, dropout: 0.0}, dtype: fp32}
optimizer: {name: adamw, lr: 0.01, weight_decay: 0.01}
training: {batch_size: 64, micro_batch_size: 16, num_workers: 0, log_every: 1}
"""


def train(launch: str, num_processes: int, recipe: Path, run: Path, steps: int) -> str:
    options = ["--config", str(recipe), "--run_dir", str(run), f"--training.steps={steps}"]
    return finish(start(launch, "--num_processes", str(num_processes), "-m", "scale_guide", "train", *options))


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["cpu", "zero1", "zero2", "zero3"])
def test_two_then_four_then_one_process(launch: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    train(launch, 2, recipe, tmp_path / "whole", 9)
    train(launch, 2, recipe, tmp_path / "changed", 3)
    assert "resumed from step 3" in train(launch, 4, recipe, tmp_path / "changed", 6)
    assert "resumed from step 6" in train(launch, 1, recipe, tmp_path / "changed", 9)
    left = sorted(p.name for p in (tmp_path / "changed/checkpoints").iterdir())
    assert left == ["step_00000006", "step_00000009"], "the copy made for other processes is gone"
    whole, changed = (load_file(tmp_path / name / "target/model.safetensors") for name in ("whole", "changed"))
    # Where a unit is nearly dead, Adam makes the rounding of its gradient as large as others: a few weights may
    # differ. Without the moments all would, by a share of the learning rate.
    off = torch.cat([(changed[name] - whole[name]).abs().flatten() > 1e-4 for name in whole])
    assert off.float().mean() < 0.02
    lines = [[line for line in read_metrics(tmp_path / n) if "task_loss" in line] for n in ("whole", "changed")]
    for ours, theirs in zip(*lines, strict=True):
        assert ours["task_loss"] == pytest.approx(theirs["task_loss"], rel=1e-4)
        assert ours["guidance_loss"] == pytest.approx(theirs["guidance_loss"], rel=1e-4)
