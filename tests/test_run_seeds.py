"""scripts/run_seeds.py: every seed in its folder, failures told and passed over, signals passed on, work taken up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import run_seeds
import torch
import yaml
from launching import PATHS, ROOT

import scale_guide.run
from scale_guide.__main__ import main
from scale_guide.tracking import read_metrics, read_summary
from scale_guide.trainer import StepLog, guided_step

RECIPE: dict[str, Any] = {
    "task": {"name": "toy:build"},
    "target": {"name": "deep_fcn", "options": {"depth": 3, "first_width": 16, "width": 16}},
    "guide": {"name": "deep_fcn", "options": {"depth": 2, "first_width": 16, "width": 8, "batch_norm": False}},
    "training": {"batch_size": 32, "steps": 4, "num_workers": 0, "log_every": 1},
    "variants": {"unguided": {"guidance.weight": 0}, "guided": {}, "shuffled": {"guide.input": "shuffled"}},
}


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return str(tmp_path / "tiny.yaml")


def test_the_command_of_a_seed() -> None:
    given = ["quickstart", "--seeds", "2", "--variants=unguided,guided", "--config", "as_released", "--optimizer.lr=1"]
    options, overrides = run_seeds.parse([*given, "--config_file", "some.yaml", "--num_processes=3"])
    command = " ".join(run_seeds.train_command(options, overrides, 7)[2:])
    assert command.startswith("accelerate.commands.launch --config_file some.yaml --num_processes 3 -m scale_guide")
    assert command.endswith(
        "train --config quickstart --config as_released --optimizer.lr=1 --training.seed 7 "
        f"--run_dir {Path('runs/quickstart/seed_7')} --only unguided,guided"
    )


@pytest.mark.parametrize("option", ["--run_dir=x", "--training.seed", "--only=a", "--seeds=0"])
def test_options_that_are_the_scripts_own(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_seeds.parse(["quickstart", option])
    assert "error: --" in capsys.readouterr().err


def test_all_variants_of_a_seed_see_the_same_data(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order and augmentation, from the first step to the last; another seed sees another order."""
    seen: list[torch.Tensor] = []

    def step(batches: Any, **kwargs: Any) -> StepLog:
        seen.append(batches[0]["input"].clone())
        return guided_step(batches, **kwargs)

    monkeypatch.setattr(scale_guide.run, "guided_step", step)
    for seed in (0, 1):
        run = ["--run_dir", str(tmp_path / f"seed_{seed}"), f"--training.seed={seed}"]
        assert main(["train", "--config", recipe, *run]) == 0
    per_run = [torch.stack(seen[i : i + 4]) for i in range(0, len(seen), 4)]
    assert len(per_run) == 6
    for i in range(6):
        assert torch.equal(per_run[i], per_run[i // 3 * 3])
    assert not torch.equal(per_run[0], per_run[3])


def test_a_seed_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    def code(seed: int) -> list[str]:
        text = f"import sys, pathlib; pathlib.Path({str(tmp_path / str(seed))!r}).touch(); sys.exit({3 * (seed == 1)})"
        return [sys.executable, "-c", text]

    assert run_seeds.run_all({seed: code(seed) for seed in range(3)}) == ({1: 3}, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "2"]


LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.Popen([sys.executable, "-c", sys.argv[1]]).wait())
"""
TRAINING = """
import signal, sys, time, pathlib
def stop(number, frame):
    time.sleep(0.5)
    pathlib.Path({saved!r}).write_text(str(number))
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
pathlib.Path({began!r}).touch()
time.sleep(60)
"""
SCRIPT = "import json, run_seeds, sys; print(run_seeds.run_all({0: json.loads(sys.argv[1]), 1: ['false']}))"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_training_which_saves_before_the_script_ends(number: int, tmp_path: Path) -> None:
    """Even where the launcher, like Accelerate's for one process, dies of the signal at once."""
    began, saved = tmp_path / "began", tmp_path / "saved"
    training = TRAINING.format(began=str(began), saved=str(saved))
    command = json.dumps([sys.executable, "-c", LAUNCHER, training])
    script = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, command],
        env=os.environ | {"PYTHONPATH": str(ROOT / "scripts")},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    limit = time.monotonic() + 30
    while not began.exists() and time.monotonic() < limit:
        time.sleep(0.05)
    script.send_signal(number)
    printed = script.communicate(timeout=30)[0]
    assert saved.read_text() == str(int(number))
    assert printed.splitlines() == ["seed 0", f"({{}}, {int(number)})"], "no further seed begins"


@pytest.mark.slow
def test_seeds_are_trained_reported_and_taken_up(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", PATHS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    runs = tmp_path / "runs"
    command = [recipe, "--seeds", "2", "--variants", "unguided,guided", "--num_processes=1", "--runs", str(runs)]
    assert run_seeds.main([*command, "--optimizer.lr=0.01"]) == 0
    assert {str(p.parent.relative_to(runs)) for p in runs.rglob("summary.json")} == {
        f"seed_{seed}/{variant}" for seed in (0, 1) for variant in ("unguided", "guided")
    }
    assert "seed_1/guided" in (runs / "report.md").read_text()
    first = [read_metrics(runs / f"seed_{seed}/guided")[0]["task_loss"] for seed in (0, 1)]
    assert first[0] != first[1]
    # Cut off in the middle of its second seed: a finished variant stays as it is, the other is trained.
    (runs / "seed_1/guided/summary.json").unlink()
    kept = (runs / "seed_1/unguided/summary.json").stat().st_mtime_ns
    capfd.readouterr()
    assert run_seeds.main([*command, "--optimizer.lr=0.01"]) == 0
    assert capfd.readouterr().out.count("already finished") == 3
    assert read_summary(runs / "seed_1/guided") is not None
    assert (runs / "seed_1/unguided/summary.json").stat().st_mtime_ns == kept
    # Another learning rate does not fit the checkpoints: each seed fails, both are told of.
    assert run_seeds.main([*command, "--optimizer.lr=0.02"]) == 1
    assert capfd.readouterr().err.count("failed: seed") == 2
