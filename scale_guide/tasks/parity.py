"""Parity: is the sum of a string of bits even or odd (PAPER.md section 2).

For a length uniform in min_length..max_length one sample is that many bits, then padding up to max_length, and the
label sum mod 2. One label per sequence; chance is 50 %.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from scale_guide.tasks import Batch, ratio
from scale_guide.tasks._generated import GeneratedSequences, make_splits
from scale_guide.tasks._labelled import Labelled

PADDING, VOCAB_SIZE = 2, 3


def _sample(random: np.random.Generator, length: int, longest: int) -> dict[str, Tensor]:
    """Sample of `input` and `mask` [longest] (mask: a bit, not padding) and `target`."""
    tokens = torch.full((longest,), PADDING, dtype=torch.int64)
    tokens[:length] = torch.from_numpy(random.integers(0, 2, length))
    return {"input": tokens, "target": tokens[:length].sum() % 2, "mask": torch.arange(longest) < length}


class Parity(Labelled):
    """The task: cross-entropy and accuracy per sequence."""

    def __init__(self, train: GeneratedSequences, validation: GeneratedSequences) -> None:
        self.train = train
        self.validation = validation
        self.facts: dict[str, Any] = {
            "vocab_size": VOCAB_SIZE,
            "num_classes": 2,
            "max_length": train.lengths[1],
            "padding_id": PADDING,
        }

    @torch.no_grad()
    def scores(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """Sums over sequences: loss, correct, count."""
        right = self.correct(output, batch) * batch["weight"]
        sums = {"loss": self.losses(output, batch), "correct": right, "count": batch["weight"]}
        return {name: value.sum(dtype=torch.float64) for name, value in sums.items()}

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        """Loss (nats per sequence) and accuracy."""
        return {"loss": ratio(sums["loss"], sums["count"]), "accuracy": ratio(sums["correct"], sums["count"])}


def build(
    *, min_length: int = 2, max_length: int = 50, num_train: int = 80_000, num_validation: int = 10_000, seed: int = 0
) -> Parity:
    """Parity task of two bits and padding, by default the paper's lengths.

    Raises:
        ValueError: a length, count or seed that makes no data.
    """
    train, validation = make_splits(
        _sample, lengths=(min_length, max_length), papers=(2, 50), sizes=(num_train, num_validation), seed=seed
    )
    return Parity(train, validation)
