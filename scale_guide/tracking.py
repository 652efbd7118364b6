"""What a run leaves behind and shows: the run folder, metrics, progress, experiment trackers, stop signals."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from scale_guide.config import Recipe
from scale_guide.disk import write_atomically

PACKAGES = ("torch", "torchvision", "accelerate", "deepspeed", "transformers", "safetensors")


def plain(recipe: Recipe) -> dict[str, Any]:
    """Returns the recipe as nested dicts, lists and numbers, ready for YAML or JSON."""
    return json.loads(json.dumps(asdict(recipe)))  # type: ignore[no-any-return]


def environment(**facts: Any) -> dict[str, Any]:
    """Returns what is needed to run the same again: versions, commit, command line, and the given `facts`."""
    versions = {name: metadata.version(name) for name in PACKAGES if _installed(name)}
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        commit = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit,
        "device": device,
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **facts,
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl; a last line cut short by a kill is left out."""
    path = run_dir / "metrics.jsonl"
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


class RunFolder:
    """The files of one run; only the main rank writes, the others' calls do nothing."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        """Opens (and on the main rank makes) the folder."""
        self.path = path
        self.writes = writes
        self._warned = False

    def start(self, recipe: Recipe, facts: Mapping[str, Any], layers: Mapping[str, Any], step: int) -> None:
        """Writes config.yaml, environment.json and layers.json; drops metrics after `step`, which will come again."""
        if not self.writes:
            return
        write_atomically(self.path / "config.yaml", yaml.safe_dump(plain(recipe), sort_keys=False))
        write_atomically(self.path / "environment.json", json.dumps(facts, indent=1))
        write_atomically(self.path / "layers.json", json.dumps(layers, indent=1))
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        write_atomically(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
        (self.path / "summary.json").unlink(missing_ok=True)

    def log(self, line: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl. A full disk costs the line, not the run."""
        if not self.writes:
            return
        try:
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            if not self._warned:
                warnings.warn(f"metrics.jsonl cannot be written ({error}); lines are lost.", stacklevel=2)
            self._warned = True

    def finish(self, summary: Mapping[str, Any], weights: dict[str, Tensor], description: Mapping[str, Any]) -> None:
        """Writes target/ (weights and how to build the network) and, last of all, summary.json."""
        if not self.writes:
            return
        target = self.path / "target"
        target.mkdir(exist_ok=True)
        save_file(weights, target / "model.safetensors.partial", metadata={"format": "pt"})
        (target / "model.safetensors.partial").replace(target / "model.safetensors")
        write_atomically(target / "config.json", json.dumps(description, indent=1, default=str))
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=1))


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """Returns summary.json, or None when the run has not finished."""
    path = run_dir / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


class Progress:
    """Progress of one run on the main rank: a bar on a terminal, otherwise one line per logged step."""

    def __init__(self, label: str, *, first_step: int, num_steps: int, batch_size: int, shown: bool) -> None:
        """Starts the clock; `shown` is False on all ranks but the main one."""
        self.label, self.num_steps, self.batch_size, self.shown = label, num_steps, batch_size, shown
        self._terminal = sys.stdout.isatty()
        self._began, self._first = time.perf_counter(), first_step
        self._last = (self._began, first_step)
        self._bar = tqdm(
            total=num_steps, initial=first_step, desc=label, unit="step", disable=not (shown and self._terminal)
        )

    def advance(self) -> None:
        """Counts one step."""
        self._bar.update()

    def rate(self, step: int) -> float:
        """Returns rows per second since the last call."""
        now = time.perf_counter()
        seconds, steps = now - self._last[0], step - self._last[1]
        self._last = (now, step)
        return steps * self.batch_size / max(seconds, 1e-9)

    def show(self, step: int, rows_per_s: float, values: Mapping[str, float]) -> None:
        """Shows the numbers of a logged step."""
        numbers = {"rows/s": f"{rows_per_s:.0f}", **{name: f"{value:.4g}" for name, value in values.items()}}
        if self._terminal:
            self._bar.set_postfix(numbers)
        elif self.shown:
            spent = time.perf_counter() - self._began
            left = spent / max(step - self._first, 1) * (self.num_steps - step)
            listed = "  ".join(f"{name} {value}" for name, value in numbers.items())
            print(f"{self.label}  step {step}/{self.num_steps}  {listed}  {_clock(left)} left", flush=True)

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if self.shown:
            tqdm.write(f"{self.label}  {text}")
            sys.stdout.flush()

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class StopSignal:
    """Remembers SIGTERM and Ctrl-C, so that a run can save and leave; a second Ctrl-C leaves at once."""

    GRACE_S = 1.0
    """A launcher may pass one Ctrl-C on twice: a second signal within this time is the same one."""

    def __init__(self) -> None:
        """Takes the signals over until `close`."""
        self.requested = False
        self._at = 0.0
        self._owner = os.getpid()
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if os.getpid() != self._owner:  # a loader worker forked from us
            os._exit(128 + number)
        if self.requested and number == signal.SIGINT and now - self._at > self.GRACE_S:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._at = True, now

    def close(self) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def quiet_worker(worker: int) -> None:
    """Makes a loader worker leave Ctrl-C to its parent and die of SIGTERM (used as worker_init_fn)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
