"""How check_parity.py starts its measured side: an `accelerate launch` per engine, number format and process count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
Case = tuple[str, str, int]
"""(task, layout, k)."""


@dataclass(frozen=True)
class Launch:
    """One `accelerate launch`, in which all cases (task, layout, k) run one after another."""

    dtype: str
    engine: str
    processes: int

    @property
    def name(self) -> str:
        """What `Engine.name` says under this launch."""
        return "DDP" if self.engine == "ddp" else f"ZeRO-{self.engine[-1]}"

    @property
    def device(self) -> str:
        """cuda where there is a GPU for each process, else cpu."""
        return "cuda" if torch.cuda.device_count() >= self.processes else "cpu"

    def __str__(self) -> str:
        return f"{self.dtype} {self.engine} x {self.processes} on {self.device}"


def run(launch: Launch, cases: Sequence[Case], bug: str | None, folder: Path, label: str) -> list[dict[str, Any]]:
    """Returns what the worker found; exits with 2 if it failed. On a terminal it shows which case is running."""
    path = folder / f"{launch.dtype}_{launch.engine}_{launch.processes}.json"
    job = {"engine": launch.name, "processes": launch.processes, "device": launch.device, "dtype": launch.dtype}
    path.write_text(json.dumps({**job, "bug": bug, "cases": cases}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(_launch_file(launch, folder))]
    command += [str(ROOT / "scripts" / "parity_worker.py"), str(path)]
    # One thread each: the networks are tiny, and the processes share the cores.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if launch.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    tail: list[str] = []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                tail = [*tail[-60:], line]
                if line.startswith("parity: ") and sys.stdout.isatty():
                    print(f"\r{label}: {line[len('parity: ') :].strip():<30}\r", end="", flush=True)
        except BaseException:
            process.terminate()
            raise
    if process.returncode or not path.with_suffix(".pt").exists():
        print("".join(tail), file=sys.stderr)
        print(f"check_parity: the launch {launch} failed with exit code {process.returncode}.", file=sys.stderr)
        raise SystemExit(2)
    results: list[dict[str, Any]] = torch.load(path.with_suffix(".pt"), weights_only=True)
    return results


def _launch_file(launch: Launch, folder: Path) -> Path:
    """Returns a launch file like the repository's, for this number of processes."""
    if launch.engine == "ddp":
        shipped = "cpu" if launch.device == "cpu" else "ddp"
    else:
        shipped = launch.engine.replace("zero0", "zero1")  # no launch file is shipped for stage 0, only its JSON
    config = yaml.safe_load((ROOT / "accelerate_configs" / f"{shipped}.yaml").read_text())
    config["num_processes"] = launch.processes
    if launch.engine != "ddp":
        deepspeed = json.loads((ROOT / "ds_configs" / f"{launch.engine}.json").read_text())
        if launch.engine == "zero3":
            # As shipped, tensors as small as these would stay whole on every rank.
            deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        path = folder / f"{launch.engine}.json"
        path.write_text(json.dumps(deepspeed))
        config["deepspeed_config"]["deepspeed_config_file"] = str(path)
    path = folder / f"{launch.engine}_{launch.processes}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
