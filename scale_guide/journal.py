"""Where a run says how it goes: metrics.jsonl, the terminal, and experiment trackers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from scale_guide.trackers import Trackers
from scale_guide.tracking import Progress, RunFolder


class Journal:
    """The log of one run, from the step it begins or goes on with.

    Attributes:
        progress: The terminal's part.
    """

    SHOWN = ("task_loss", "guidance_loss", "distillation_loss", "similarity")
    """What of a logged line the terminal shows."""

    def __init__(self, folder: RunFolder, trackers: Trackers, progress: Progress, *, seconds_before: float) -> None:
        """Starts the clock; the run took `seconds_before` up to here."""
        self.progress = progress
        self._folder, self._trackers = folder, trackers
        self._began = time.perf_counter() - seconds_before

    @property
    def seconds(self) -> float:
        """Time spent on the run so far, interruptions apart."""
        return time.perf_counter() - self._began

    def step(self, done: int, values: Mapping[str, Any]) -> None:
        """Writes and shows the figures of step number `done`, counted from 1."""
        line = {"step": done, **values, "rows_per_s": self.progress.rate(done), "seconds": self.seconds}
        self._folder.log(line)
        shown = {name: float(line[name]) for name in self.SHOWN if line.get(name) is not None}
        self.progress.show(done, line["rows_per_s"], shown)
        self._trackers.log(line, done)

    def validation(self, done: int, scores: Mapping[str, float]) -> None:
        """Writes and shows the validation scores after step number `done`."""
        self._folder.log({"step": done, "seconds": self.seconds, "validation": dict(scores)})
        self._trackers.log(scores, done, prefix="validation/")
        listed = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
        self.progress.say(f"step {done}/{self.progress.num_steps}  validation  {listed}")
