"""Copy-paste: read a string of digits, then write it again (PAPER.md section 2).

For L digits, L uniform in min_length..max_length, one sample is

    input   d1 .. dL  COPY  0 .. 0 (L)      EOS
    target   0 .. 0   0     d1 .. dL        EOS

A target of 0 is ignored in loss and accuracy, as in the paper: so the digit 0 is never scored, and a model that knows
where it must write but not what reaches (0.1 L + 1) / (0.9 L + 1) of the scored tokens: 14.29 % at L = 30.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from scale_guide.tasks import Batch, logits, ratio, stack, token_losses
from scale_guide.tasks._generated import GeneratedSequences, make_splits

IGNORED, COPY, EOS, VOCAB_SIZE = 0, 11, 12, 13


def _sample(random: np.random.Generator, length: int, longest: int) -> dict[str, Tensor]:
    """Sample of `input`, `target` and `mask` [2 longest + 2] (mask: a real token)."""
    digits = torch.from_numpy(random.integers(0, 10, length))
    tokens = torch.zeros(2 * longest + 2, dtype=torch.int64)
    target = torch.zeros_like(tokens)
    tokens[:length] = digits
    tokens[length] = COPY
    target[length + 1 : 2 * length + 1] = digits
    tokens[2 * length + 1] = target[2 * length + 1] = EOS
    return {"input": tokens, "target": target, "mask": torch.arange(len(tokens)) < 2 * length + 2}


class CopyPaste:
    """The task; scored per token whose target is not 0, and per whole sequence."""

    score = "accuracy"

    def __init__(self, train: GeneratedSequences, validation: GeneratedSequences) -> None:
        self.train = train
        self.validation = validation
        self.facts: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "max_length": 2 * train.lengths[1] + 2}

    def collate(self, samples: list[dict[str, Tensor]]) -> Batch:
        """Batch of `input`, `target`, `mask` [B, T] and `weight` [B]."""
        return stack(samples)

    def scored(self, batch: Batch) -> Tensor:
        """1 where a token is scored and 0 elsewhere, fp32 [B, T]."""
        return (batch["target"] != IGNORED) * batch["weight"][:, None]

    def count(self, batch: Batch) -> Tensor:
        """Number of scored tokens, float64 scalar."""
        return self.scored(batch).sum(dtype=torch.float64)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Sum of the cross-entropy over scored tokens, in nats."""
        return (token_losses(logits(output), batch["target"]) * self.scored(batch)).sum()

    @torch.no_grad()
    def scores(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """Sums over scored tokens (loss, correct, count) and over sequences (whole, sequences)."""
        values, target, scored = logits(output), batch["target"], self.scored(batch)
        right = values.argmax(-1) == target
        whole = (right | (target == IGNORED)).all(-1)
        return {
            "loss": (token_losses(values, target) * scored).sum(dtype=torch.float64),
            "correct": (right * scored).sum(dtype=torch.float64),
            "count": scored.sum(dtype=torch.float64),
            "whole": (whole * batch["weight"]).sum(dtype=torch.float64),
            "sequences": batch["weight"].sum(dtype=torch.float64),
        }

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        """Loss (nats per scored token), accuracy (per scored token), sequence_accuracy (every scored token right)."""
        return {
            "loss": ratio(sums["loss"], sums["count"]),
            "accuracy": ratio(sums["correct"], sums["count"]),
            "sequence_accuracy": ratio(sums["whole"], sums["sequences"]),
        }


def build(
    *, min_length: int = 20, max_length: int = 40, num_train: int = 80_000, num_validation: int = 10_000, seed: int = 0
) -> CopyPaste:
    """Copy-paste task of 13 tokens and sequences of 2 max_length + 2.

    Raises:
        ValueError: a length, count or seed that makes no data.
    """
    train, validation = make_splits(
        _sample, lengths=(min_length, max_length), papers=(20, 40), sizes=(num_train, num_validation), seed=seed
    )
    return CopyPaste(train, validation)
