"""`accelerate launch` from a test: real processes on the CPU, and none left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 400  # the first launch under DeepSpeed also compiles: half a minute, minutes on a busy machine
# The path: torchrun, unlike the launcher of DeepSpeed, does not add the current folder.
PATHS = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"


def start(file: str, *arguments: str) -> subprocess.Popen[str]:
    """Starts `accelerate launch` with a file of accelerate_configs/ and what follows it."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{file}.yaml"]
    return subprocess.Popen(
        [*command, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": PATHS, "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(*launches: subprocess.Popen[str]) -> str:
    """Returns what the launches printed; fails, with all of it, if one did not end well or in time."""
    try:
        outputs = [launch.communicate(timeout=LIMIT_S)[0] for launch in launches]
    except subprocess.TimeoutExpired:
        for launch in launches:
            os.killpg(launch.pid, signal.SIGKILL)
        pytest.fail(f"no end after {LIMIT_S} s:\n" + "\n".join(launch.communicate()[0] for launch in launches))
    everything = "\n".join(outputs)
    assert [launch.returncode for launch in launches] == [0] * len(launches), everything[-5000:]
    return everything
