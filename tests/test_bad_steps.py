"""Numbers that go wrong, in one place and on one rank: skipped on all alike, counted, traced, and in the end fatal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from breaking import SAMPLE
from launching import finish, start
from safetensors.torch import load_file

from scale_guide.__main__ import main
from scale_guide.data_order import TrainOrder
from scale_guide.manifest import whole_checkpoints
from scale_guide.tracking import read_metrics, read_summary

RECIPE = """
task: {{name: "breaking:build"}}
target: {{name: "breaking:network", options: {{breaks: {target}}}}}
guide: {{name: "breaking:network", options: {{breaks: {guide}}}, dtype: fp32}}
optimizer: {{name: adamw, lr: 0.01}}
training: {{batch_size: 32, micro_batch_size: 8, steps: 10, num_workers: 0, log_every: 1, checkpoint_every: 1,
            keep_checkpoints: 10}}
"""


def recipe(folder: Path, *, target: bool, guide: bool) -> str:
    text = RECIPE.format(target=str(target).lower(), guide=str(guide).lower())
    (folder / "recipe.yaml").write_text(text)
    return str(folder / "recipe.yaml")


def place(world_size: int) -> tuple[int, int, int]:
    """The step, from 1, the rank and the micro-batch that read the sample in the first epoch."""
    sizes = {"micro_batch_size": 8, "seed": 0, "first_step": 0, "last_step": 10}
    for rank in range(world_size):
        order = TrainOrder(320, 32, rank=rank, world_size=world_size, **sizes)
        for number, batch in enumerate(order):
            if any(index == SAMPLE for _, index in batch):
                step, micro_batch = divmod(number, order.num_micro_batches)
                return step + 1, rank, micro_batch
    raise AssertionError("an epoch has every sample")


def check(run: Path, world_size: int, where: str) -> None:
    """One step of ten was skipped, and the summary says where it went wrong."""
    step, rank, micro_batch = place(world_size)
    summary = read_summary(run)
    assert summary is not None
    told = f"step {step}: rank {rank}, micro-batch {micro_batch}: {where} is not finite for samples {SAMPLE}"
    assert summary["skipped_steps"] == [told]
    assert summary["num_skipped_steps"] == 1
    lines = [line for line in read_metrics(run) if "validation" not in line]
    assert [line["step"] for line in lines if line.get("skipped")] == [step]
    assert torch.isfinite(torch.tensor([line["task_loss"] for line in lines if "task_loss" in line])).all()
    weights = load_file(run / "target/model.safetensors")
    assert all(value.isfinite().all() for value in weights.values()), "running statistics too"


@pytest.mark.parametrize(("target", "guide"), [(True, False), (False, True)])
def test_a_skipped_step_changes_nothing(target: bool, guide: bool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", "--config", recipe(tmp_path, target=target, guide=guide), "--run_dir", str(run)]) == 0
    check(run, 1, f"{'target' if target else 'guide'} layer breaking")
    step, _, _ = place(1)
    before, after = (load_file(run / f"checkpoints/step_{n:08d}/model.safetensors") for n in (step - 1, step))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("weight", ["0", "1"])
@pytest.mark.parametrize("accumulation", ["exact", "per_micro_batch"])
def test_with_and_without_guidance(weight: str, accumulation: str, tmp_path: Path) -> None:
    options = [f"--guidance.weight={weight}", f"--guidance.accumulation={accumulation}"]
    config = ["--config", recipe(tmp_path, target=True, guide=False), "--run_dir", str(tmp_path / "run")]
    assert main(["train", *config, *options]) == 0
    check(tmp_path / "run", 1, "target layer breaking")


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2", "cpu")]


@pytest.mark.parametrize("launch", [*SLOW, "zero3"])
def test_on_one_rank_of_two(launch: str, tmp_path: Path) -> None:
    """The other rank skips too, and both go on: no rank waits for another."""
    config = ["--config", recipe(tmp_path, target=True, guide=False), "--run_dir", str(tmp_path / "run")]
    finish(start(launch, "-m", "scale_guide", "train", *config))
    check(tmp_path / "run", 2, "target layer breaking")


def test_too_many_end_the_run_with_the_state_before_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first update throws the weights to infinity; every later step is skipped."""
    config = ["--config", recipe(tmp_path, target=False, guide=False), "--run_dir", str(tmp_path / "run")]
    options = ["--optimizer.lr=1e30", "--training.max_bad_steps=3", "--training.checkpoint_every=0"]
    assert main(["train", *config, *options]) == 1
    error = capsys.readouterr().err
    assert "4 steps in a row had no finite gradient, and training.max_bad_steps is 3" in error
    assert "(the state from before them is saved, step 1)" in error
    assert "target layer second is not finite for samples" in error
    assert "Traceback" not in error
    assert [folder.name for folder in whole_checkpoints(tmp_path / "run")] == ["step_00000001"]


def test_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ["--config", recipe(tmp_path, target=False, guide=False), "--run_dir", str(tmp_path / "run")]
    assert main(["train", *config, "--training.max_bad_steps=-1"]) == 2
    assert "training.max_bad_steps=-1 must be 0 or more" in capsys.readouterr().err
