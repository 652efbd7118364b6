"""How long a part of a step takes, on a GPU without holding it up."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Seconds spent inside its `with` blocks: by events on a GPU, which nobody waits for until they are read."""

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        self._open: list[Any] = []
        self.restart()

    def restart(self) -> None:
        """Forgets what was measured."""
        self._spans: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        self._open.append(self._now())

    def __exit__(self, *_: object) -> None:
        start = self._open.pop()
        if not self._open:
            self._spans.append((start, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self) -> float:
        """Returns the seconds since `restart`; on a GPU it waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
            return float(sum(start.elapsed_time(end) for start, end in self._spans)) / 1000
        return float(sum(end - start for start, end in self._spans))
