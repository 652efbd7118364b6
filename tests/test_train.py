"""Training under `accelerate launch`: interrupted and resumed equals uninterrupted, bit for bit, on two processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import finish, start
from safetensors.torch import load_file
from torch import nn

from scale_guide.__main__ import main
from scale_guide.config import OptimizerConfig, Recipe, TrainingConfig
from scale_guide.launch import deepspeed_config
from scale_guide.running_statistics import paused
from scale_guide.tracking import read_metrics
from scale_guide.trainer import count_steps, make_optimizer

TINY = """
task: {name: "toy:build"}
target: {name: deep_fcn, options: {depth: 3, first_width: 24, width: 24, dropout: 0.2}}
guide: {name: deep_fcn, options: {depth: 2, first_width: 24, width: 24, batch_norm: false, dropout: 0.0}, dtype: fp32}
optimizer: {name: sgd, momentum: 0.9, lr: 0.05, schedule: cosine, clip_norm: 1.0}
training: {batch_size: 64, micro_batch_size: 16, steps: 6, num_workers: 1, log_every: 1}
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with dropout, BatchNorm, momentum, clipping and a schedule, small enough for seconds."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY)
    return path


# Three steps of guidance alone, two with both losses, three of the target alone; interrupted after 2 and after 7.
PHASES = [
    *("--training.steps=8", "--optimizer.weight_decay=0.01", "--guidance.warmup_steps=3"),
    *("--guidance.warmup_input=noise", "--guidance.schedule=linear", "--guidance.stop_after=5"),
    *("--guidance.reset_optimizer=true", "--guide.input=noise"),
]
# A guide of shuffled rows, and its logits beside its representations.
CONTROLS = [
    *("--guide.input=shuffled", "--guidance.distillation=0.5", "--guidance.distillation_temperature=2"),
    "--training.steps=3",
]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2")]


@pytest.mark.parametrize("launch", ["cpu", *SLOW, "zero3"])
def test_resumed_equals_uninterrupted(launch: str, tiny: Path, tmp_path: Path) -> None:
    """Two processes, two micro-batches each: SIGTERM on one rank stops both cleanly, and the same command goes on."""
    finish(start(launch, "tests/launched.py", str(tmp_path), str(tiny), *PHASES, "and", *CONTROLS))
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["engine"] == {"cpu": "DDP"}.get(launch, launch.replace("zero", "ZeRO-")), "the launch file was obeyed"
    assert facts["world_size"] == 2
    assert facts["interrupted"] is None
    assert facts["between"] == ["step_00000004"], "the ranks agree in the next step, finish it, and save"
    assert facts["phases"] == [False, False, True]
    for first, second in (("whole", "cut"), ("phases", "phases_cut")):
        whole, cut = (load_file(tmp_path / name / "target/model.safetensors") for name in (first, second))
        assert whole.keys() == cut.keys()
        for name in whole:
            assert torch.equal(whole[name], cut[name]), name
    lines = {name: read_metrics(tmp_path / name) for name in ("whole", "cut")}
    assert [line["step"] for line in lines["cut"]] == [1, 2, 3, 4, 5, 6, 6]
    for a, b in zip(lines["whole"][:6], lines["cut"][:6], strict=True):
        assert (a["task_loss"], a["guidance_loss"], a["pairs"]) == (b["task_loss"], b["guidance_loss"], b["pairs"])
    if "full_disk" in facts:
        assert facts["full_disk"]["left"] == ["step_00000002", "step_00000006"], "the failed one left nothing"
        assert any("step_00000004 could not be written" in text for text in facts["full_disk"]["warnings"])
    _check_against_one_process(tiny, tmp_path, "whole")
    _check_against_one_process(tiny, tmp_path, "phases", *PHASES)
    _check_against_one_process(tiny, tmp_path, "controls", *CONTROLS)


def _check_against_one_process(tiny: Path, tmp_path: Path, name: str, *options: str) -> None:
    """W x k = 2 x 2 equals 1 x 4, dropout and BatchNorm included: the same micro-batches draw the same masks."""
    one, many = tmp_path / f"{name}_one", tmp_path / name
    assert main(["train", "--config", str(tiny), "--run_dir", str(one), "--training.num_workers=0", *options]) == 0
    lines = [[line for line in read_metrics(run) if "task_loss" in line] for run in (one, many)]
    for a, b in zip(*lines, strict=True):
        for loss in ("task_loss", "guidance_loss", "distillation_loss"):
            assert (a.get(loss) is None) == (b.get(loss) is None)
            assert (a.get(loss) or 0) == pytest.approx(b.get(loss) or 0, rel=1e-4)
    ours, theirs = (load_file(run / "target/model.safetensors") for run in (one, many))
    for weight in (weight for weight in ours if "running" not in weight and "num_batches" not in weight):
        torch.testing.assert_close(ours[weight], theirs[weight], rtol=1e-4, atol=1e-5)


def test_unguided_never_builds_a_guide(tiny: Path, tmp_path: Path) -> None:
    options = ["--guidance.weight=0", "--guide.name=no.such:module", "--training.num_workers=0"]
    assert main(["train", "--config", str(tiny), "--run_dir", str(tmp_path / "run"), *options]) == 0
    assert "guidance_loss" not in read_metrics(tmp_path / "run")[0]


def test_accumulation_is_exact_unless_asked(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """k = 4 equals k = 1 in the exact mode; micro-batches by themselves give another, larger similarity."""
    first = {}
    common = ["--training.num_workers=0", "--training.steps=1", "--target.options.batch_norm=false"]
    common += ["--target.options.dropout=0"]
    for name, options in {
        "graph": ["--training.micro_batch_size=64"],
        "exact": [],
        "parts": ["--guidance.accumulation=per_micro_batch"],
    }.items():
        assert main(["train", "--config", str(tiny), "--run_dir", str(tmp_path / name), *common, *options]) == 0
        first[name] = read_metrics(tmp_path / name)[0]
        # The layout is chosen, and shown, for the rows that it is computed over.
        assert f"({16 if name == 'parts' else 64} rows over 1 process)" in capsys.readouterr().out
    assert first["exact"]["guidance_loss"] == pytest.approx(first["graph"]["guidance_loss"], rel=1e-5)
    assert first["exact"]["task_loss"] == pytest.approx(first["graph"]["task_loss"], rel=1e-5)
    assert abs(first["parts"]["guidance_loss"] - first["graph"]["guidance_loss"]) > 1e-2
    weights = {name: load_file(tmp_path / name / "target/model.safetensors") for name in first}
    for name, value in weights["graph"].items():
        torch.testing.assert_close(weights["exact"][name], value, rtol=1e-4, atol=1e-6)


def test_frozen_parameters_stay_out_of_the_optimizer() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    network[0].requires_grad_(False)
    groups = make_optimizer(OptimizerConfig(name="adamw"), network).param_groups
    assert [p.shape for p in groups[0]["params"]] == [(2, 3), (2,)]


def test_count_steps() -> None:
    assert count_steps(Recipe(training=TrainingConfig(epochs=2.5)), 4) == 10
    assert count_steps(Recipe(training=TrainingConfig(steps=7)), 4) == 7
    with pytest.raises(ValueError, match="exactly one is needed, but neither"):
        count_steps(Recipe(), 4)
    with pytest.raises(ValueError, match="epochs=1 and steps=2"):
        count_steps(Recipe(training=TrainingConfig(epochs=1, steps=2)), 4)
    with pytest.raises(ValueError, match="at least one step"):
        count_steps(Recipe(training=TrainingConfig(epochs=0.1)), 4)


def test_running_statistics_paused() -> None:
    network = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x = torch.randn(8, 3)
    with paused(network):
        output = network(x)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    torch.testing.assert_close(network(x), output)
    assert network[0].num_batches_tracked == 1
    assert not network[1].track_running_stats


def test_the_deepspeed_file_must_agree_with_the_recipe() -> None:
    """A file that clips or counts otherwise is an error; 0.0 and "auto" leave it to the recipe."""
    stage3 = {"zero_optimization": {"stage": 3}}
    sizes = {"micro_batch_size": 8, "world_size": 2, "clip_norm": 1.0}
    shipped = {"gradient_clipping": 0.0, "train_micro_batch_size_per_gpu": "auto", **stage3}
    config = deepspeed_config(shipped, **sizes)
    assert (config["gradient_clipping"], config["gradient_accumulation_steps"]) == (1.0, 1)
    assert (config["train_micro_batch_size_per_gpu"], config["train_batch_size"]) == (8, 16)
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    assert shipped["gradient_clipping"] == 0.0, "the next variant starts from the file again"
    assert deepspeed_config(stage3, **(sizes | {"clip_norm": 0.0}))["gradient_clipping"] == 0.0, (
        "never DeepSpeed's 1.0"
    )
    for key in ("gradient_clipping", "gradient_accumulation_steps", "train_batch_size"):
        with pytest.raises(ValueError, match=f"{key}=4 in the DeepSpeed file differs from the recipe's"):
            deepspeed_config({key: 4, **stage3}, **sizes)
