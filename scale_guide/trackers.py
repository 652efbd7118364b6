"""Experiment trackers, by Accelerate: TensorBoard, Weights & Biases and what else it knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Trackers:
    """The recipe's trackers of one run; none, if the Accelerator was made without."""

    def __init__(self, accelerator: Any, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Starts them in `run_dir`, with `config` for all to see."""
        self._accelerator = accelerator
        if accelerator.log_with:
            accelerator.project_configuration.logging_dir = str(run_dir)
            accelerator.trackers = []
            accelerator.init_trackers("scale_guide", config=dict(config))

    def log(self, line: Mapping[str, Any], step: int, prefix: str = "") -> None:
        """Hands them the numbers of a line."""
        numbers = {f"{prefix}{name}": float(value) for name, value in line.items() if isinstance(value, int | float)}
        if self._accelerator.log_with:
            self._accelerator.log(numbers, step=step)

    def finish(self) -> None:
        """Closes them (not Accelerate's `end_training`, which also closes the process group)."""
        for tracker in self._accelerator.trackers if self._accelerator.log_with else []:
            tracker.finish()
