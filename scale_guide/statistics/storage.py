"""Rows that wait between the two passes over micro-batches: where, in which number format, and which are padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scale_guide.statistics.plan import Node


@dataclass(frozen=True)
class Storage:
    """How rows and their gradients are kept while other micro-batches run.

    Attributes:
        dtype: Number format of kept rows; None: their own, which is exact.
        on_host: Whether they wait in the host's memory rather than the device's.
    """

    dtype: torch.dtype | None = None
    on_host: bool = False

    def rows(self, rows: Tensor) -> Tensor:
        """Returns `rows` as they are kept."""
        return rows.to(device="cpu" if self.on_host else None, dtype=self.dtype)

    def gradient(self, gradient: Tensor) -> Tensor:
        """Returns a gradient as it is kept: in its own fp32, for less would flush small ones to zero."""
        return gradient.to(device="cpu" if self.on_host else None)


@dataclass(frozen=True)
class Padding:
    """Which positions of flattened sequences are real. Padding takes the mean of its column: it says nothing.

    Attributes:
        mask: True for real positions [b, T].
        layers: The layers whose rows [b, T * width] it concerns.
    """

    mask: Tensor
    layers: frozenset[Node]
