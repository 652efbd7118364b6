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

IGNORED, COPY, EOS, VOCAB_SIZE = 0, 11, 12, 13


class CopyPasteData:
    """Samples that are a function of (seed, split, index) alone: nothing is stored, and no order changes them."""

    def __init__(self, num_samples: int, lengths: tuple[int, int], *, seed: int, split: int) -> None:
        self.num_samples = num_samples
        self.lengths = lengths
        self.seed = seed
        self.split = split

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sample of `input`, `target` and `mask` [2 max_length + 2] (mask: a real token), and `weight` 1."""
        if not 0 <= index < self.num_samples:
            raise IndexError(index)
        shortest, longest = self.lengths
        random = np.random.default_rng((self.seed, self.split, index))
        length = int(random.integers(shortest, longest + 1))
        digits = torch.from_numpy(random.integers(0, 10, length))
        tokens = torch.zeros(2 * longest + 2, dtype=torch.int64)
        target = torch.zeros_like(tokens)
        tokens[:length] = digits
        tokens[length] = COPY
        target[length + 1 : 2 * length + 1] = digits
        tokens[2 * length + 1] = target[2 * length + 1] = EOS
        mask = torch.arange(len(tokens)) < 2 * length + 2
        return {"input": tokens, "target": target, "mask": mask, "weight": torch.ones(())}


class CopyPaste:
    """The task; scored per token whose target is not 0, and per whole sequence."""

    score = "accuracy"

    def __init__(self, train: CopyPasteData, validation: CopyPasteData) -> None:
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
    if not 1 <= min_length <= max_length:
        raise ValueError(
            f"task.options.min_length is {min_length} and task.options.max_length is {max_length}: lengths must hold "
            "1 <= min_length <= max_length; the paper takes 20 and 40"
        )
    for name, value, least in (("num_train", num_train, 1), ("num_validation", num_validation, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"task.options.{name} is {value}: it must be at least {least}; set a larger one")
    lengths = (min_length, max_length)
    train = CopyPasteData(num_train, lengths, seed=seed, split=0)
    return CopyPaste(train, CopyPasteData(num_validation, lengths, seed=seed, split=1))
