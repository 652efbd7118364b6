"""The toy task with one training sample, number 84, at which a layer of `network` gives NaN."""

from __future__ import annotations

from collections import OrderedDict

import torch
import toy
from torch import Tensor, nn

SAMPLE = 84
MARK = 1000.0


class NaNAtMark(nn.Module):
    """Passes its input on, but for rows that begin with the mark."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x[:, :1].flatten(1) > MARK / 2, torch.nan, 1.0) * x


def build() -> toy.Task:
    """The task."""
    task = toy.build()
    task.train.inputs[SAMPLE, 0] = MARK
    return task


def network(*, num_classes: int, breaks: bool = True) -> nn.Sequential:
    """A network of 12 inputs; if it `breaks`, its first layer does at the marked sample."""
    torch.manual_seed(0)
    layers: list[tuple[str, nn.Module]] = [("breaking", NaNAtMark() if breaks else nn.Identity())]
    layers += [
        ("scale", nn.Hardtanh()),
        ("first", nn.Linear(12, 16)),
        ("norm", nn.BatchNorm1d(16)),
        ("relu", nn.ReLU()),
    ]
    return nn.Sequential(OrderedDict([*layers, ("second", nn.Linear(16, 16)), ("head", nn.Linear(16, num_classes))]))
