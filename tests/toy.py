"""A classification task and small networks that need no imports and no data: what a run costs beside its start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Sample = dict[str, Tensor]


class Rows:
    """`num` rows of 12 numbers in 5 classes; row `unreadable` has weight 0; noise is drawn anew on every read."""

    def __init__(self, num: int, seed: int, unreadable: int | None, *, noise: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(num, 12, generator=generator)
        self.targets = self.inputs[:, :5].argmax(1)
        self.unreadable, self.noise = unreadable, noise

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Sample:
        weight = torch.tensor(float(index != self.unreadable))
        noise = torch.randn(12) * self.noise
        return {"input": (self.inputs[index] + noise) * weight, "target": self.targets[index], "weight": weight}


class Task:
    """Rows in 5 classes."""

    score = "accuracy"

    def __init__(self, unreadable: int | None) -> None:
        self.train = Rows(320, 0, unreadable, noise=0.1)
        self.validation = Rows(37, 1, None, noise=0.0)
        self.facts: dict[str, Any] = {"num_classes": 5, "input_shape": (12, 1, 1)}

    def collate(self, samples: list[Sample]) -> Sample:
        return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}

    def sample_name(self, index: int) -> str:
        return f"row {index}"

    def scored(self, batch: Sample) -> Tensor:
        return batch["weight"]

    def count(self, batch: Sample) -> Tensor:
        return self.scored(batch).double().sum()

    def loss(self, output: Tensor, batch: Sample) -> Tensor:
        losses = functional.cross_entropy(output.float(), batch["target"], reduction="none")
        return (losses * batch["weight"]).sum()

    def scores(self, output: Tensor, batch: Sample) -> dict[str, Tensor]:
        right = ((output.argmax(1) == batch["target"]) * batch["weight"]).double().sum()
        return {"right": right, "count": self.count(batch), "loss": self.loss(output, batch).double()}

    def correct(self, output: Tensor, batch: Sample) -> Tensor:
        return output.argmax(1) == batch["target"]

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        count = sums["count"]
        return {"loss": sums["loss"] / count, "accuracy": sums["right"] / count, "count": count}


def build(*, unreadable: int | None = None) -> Task:
    """Returns the task; `unreadable` is the index of a training row that cannot be read."""
    return Task(unreadable)
