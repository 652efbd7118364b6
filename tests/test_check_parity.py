"""The parity script is right about the product, and sees each bug that it exists to see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def check_parity(*options: str, timeout_s: int = 240) -> subprocess.CompletedProcess[str]:
    """The script's output and exit code: 0 equal, 1 not equal, 2 it could not run."""
    command = [sys.executable, str(ROOT / "scripts" / "check_parity.py"), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, env=environment, cwd=ROOT.parent, capture_output=True, text=True, timeout=timeout_s, check=False
    )


def test_two_processes_equal_one(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    options = ["--processes=2", "--engines=ddp,zero3", "--dtype=fp32", "--accumulation=1,3", f"--json={figures}"]
    done = check_parity(*options, "--layouts=gather,transpose,covariance", "--tasks=copy_paste,coupled")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    assert len(found["rows"]) == 2 * (3 + 2) * 2, "engines x (three layouts of copy_paste, two of coupled) x k"
    assert max(row["update"] for row in found["rows"]) < 1e-4
    assert min(moved for task in found["moved"].values() for moved in task.values()) >= 0.01
    # Under ZeRO-3 no gradient outlives its micro-batch in full size.
    assert all(row["kept"] == 0 for row in found["rows"] if row["engine"] == "zero3")


@pytest.mark.parametrize("bug", ["world", *(pytest.param(b, marks=pytest.mark.slow) for b in ("centre", "count"))])
def test_planted_bug_is_seen(bug: str, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    done = check_parity(f"--break={bug}", "--tasks=copy_paste", "--accumulation=1,3", f"--json={figures}")
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"planted bug '{bug}': SEEN" in done.stdout
    # Not only seen, but in every layout and with micro-batches, and far above what rounding does.
    rows = json.loads(figures.read_text())["rows"]
    assert len(rows) == 4 * 2
    assert min(row["update"] for row in rows) > 1e-3


@pytest.mark.parametrize("bug", ["masks", pytest.param("running", marks=pytest.mark.slow)])
def test_planted_bug_of_the_two_passes_is_seen(bug: str, tmp_path: Path) -> None:
    """Already on one process: other dropout masks in the first pass, and BatchNorm counting in both."""
    figures = tmp_path / "figures.json"
    options = ["--processes=1", "--tasks=coupled", "--accumulation=1,3", f"--json={figures}"]
    done = check_parity(f"--break={bug}", *options)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"planted bug '{bug}': SEEN" in done.stdout
    rows = json.loads(figures.read_text())["rows"]
    assert [row["k"] for row in rows if row["update"] > 1e-3] == [3, 3], (
        "in both layouts, and where there are two passes"
    )
    if bug == "running":
        assert all("norm" in row["tensor"] for row in rows if row["k"] == 3)


def test_a_bug_that_could_not_show_is_refused() -> None:
    done = check_parity("--break=masks", "--accumulation=1")
    assert done.returncode == 2
    assert "needs two passes" in done.stderr


def test_a_launch_that_cannot_run_is_not_a_difference() -> None:
    done = check_parity("--processes=2,5")
    assert done.returncode == 2
    assert "not a multiple of 5" in done.stderr


@pytest.mark.slow
def test_every_engine_equals_one_process() -> None:
    done = check_parity("--accumulation=1,3,8", timeout_s=1800)
    assert done.returncode == 0, done.stdout + done.stderr
