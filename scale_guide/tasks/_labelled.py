"""What tasks with one label per sample share: the batch, the count of samples that are scored, the cross-entropy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from scale_guide.tasks import Batch, logits, stack


class Labelled:
    """A task of samples of `input`, `target` (the class) and `weight`; a base, without data and scores."""

    score = "accuracy"

    def collate(self, samples: list[dict[str, Tensor]]) -> Batch:
        """Batch of `input` [B, ...] and what else a sample has, with `target` and `weight` [B]."""
        return stack(samples)

    def scored(self, batch: Batch) -> Tensor:
        """Weight of each sample, fp32 [B]."""
        return batch["weight"]

    def count(self, batch: Batch) -> Tensor:
        """Number of scored samples, float64 scalar."""
        return self.scored(batch).sum(dtype=torch.float64)

    def losses(self, output: Any, batch: Batch) -> Tensor:
        """Cross-entropy of each sample, 0 where it is not scored, in nats [B]."""
        return functional.cross_entropy(logits(output), batch["target"], reduction="none") * batch["weight"]

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Sum of the cross-entropy over scored samples, in nats."""
        return self.losses(output, batch).sum()

    @torch.no_grad()
    def correct(self, output: Any, batch: Batch) -> Tensor:
        """Whether each sample is answered correctly, its largest logit being the answer: bool [B]."""
        return logits(output).argmax(dim=-1) == batch["target"]
