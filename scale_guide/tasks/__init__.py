"""Tasks: data, loss and scores. A file's name is the task's name on the command line; its `build` returns a Task.

A task knows nothing of processes: it returns sums over scored terms, and the trainer divides by the global count.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

Batch = dict[str, Tensor]
"""`input` [B, ...], `target` [B, ...], `weight` [B] fp32 (0: no part in anything), optional `mask` [B, T] bool."""


class SizedDataset(Sized, Protocol):
    """A map-style dataset of known length."""

    def __getitem__(self, index: int) -> Any: ...


class Task(Protocol):
    """What is learned. Augmentation draws from torch's global generator alone, which the data order seeds.

    A task whose samples may be unreadable (weight 0) also has `sample_name(index) -> str`, for the summary. One with
    an answer per sample has `correct(output, batch) -> bool [B]`, for error consistency.
    """

    train: SizedDataset
    validation: SizedDataset
    facts: dict[str, Any]
    """Handed to models whose `build` names them: num_classes, input_shape (C, H, W), vocab_size, max_length."""
    score: str
    """Name of the headline score in what `summarize` returns."""

    def collate(self, samples: list[Any]) -> Batch:
        """Batch of the samples, in their order."""
        ...

    def scored(self, batch: Batch) -> Tensor:
        """Weight of each term (row or token) of the batch, 0: not scored: fp32 [B] or [B, T], the logits' but C."""
        ...

    def count(self, batch: Batch) -> Tensor:
        """Number of scored terms (rows or tokens), weights respected: the sum of `scored`, float64 scalar."""
        ...

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Sum of the loss over the scored terms, differentiable: scalar of the logits' precision, at least fp32."""
        ...

    def scores(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """Sums over the batch, float64 scalars; sums of several batches and ranks may be added."""
        ...

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        """Scores of a whole evaluation from its added sums."""
        ...


def logits(output: Any) -> Tensor:
    """Logits [B, ..., C] of a model's output (a tensor, or anything with `.logits`), half precision raised to fp32."""
    values: Tensor = output.logits if hasattr(output, "logits") else output
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def token_losses(values: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of every token [B, T], in nats, from logits [B, T, V] and targets [B, T]."""
    return functional.cross_entropy(values.flatten(0, 1), target.flatten(), reduction="none").view_as(target)


def stack(samples: list[dict[str, Tensor]]) -> Batch:
    """Batch whose entries are the samples' entries stacked along a new first axis."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def ratio(total: float, count: float) -> float:
    """Total / count, or NaN when nothing was scored."""
    return total / count if count else float("nan")


__all__ = ["Batch", "SizedDataset", "Task", "logits", "ratio", "stack", "token_losses"]
