"""Deep FCN: the fully connected network that hardly trains alone (PAPER.md section 2)."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from math import prod

from torch import Tensor, nn


class DeepFCN(nn.Module):
    """`depth` hidden blocks of Linear, BatchNorm, ReLU, Dropout, then a Linear to the logits."""

    def __init__(self, widths: list[int], num_classes: int, *, dropout: float, batch_norm: bool) -> None:
        super().__init__()
        sizes = pairwise(widths)
        self.hidden = nn.ModuleList(_block(a, b, dropout=dropout, batch_norm=batch_norm) for a, b in sizes)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] from images [B, C, H, W]."""
        x = images.flatten(1)
        for block in self.hidden:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def _block(num_in: int, num_out: int, *, dropout: float, batch_norm: bool) -> nn.Sequential:
    """One hidden block. ReLU is not in place, so that what a hook took from the Linear stays what it was."""
    parts: OrderedDict[str, nn.Module] = OrderedDict(linear=nn.Linear(num_in, num_out))
    if batch_norm:
        parts["norm"] = nn.BatchNorm1d(num_out)
    parts["relu"] = nn.ReLU()
    if dropout:
        parts["dropout"] = nn.Dropout(dropout)
    return nn.Sequential(parts)


def build(
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    depth: int = 48,
    first_width: int = 2048,
    width: int = 1024,
    dropout: float = 0.1,
    batch_norm: bool = True,
) -> DeepFCN:
    """Deep FCN of `depth` hidden layers, `first_width` and then `width` wide; by default the paper's, at 3x224x224.

    Raises:
        ValueError: depth below 1.
    """
    if depth < 1:
        raise ValueError(f"depth of deep_fcn is {depth}: it must be at least 1; the paper takes 48")
    widths = [prod(input_shape), first_width, *[width] * (depth - 1)]
    return DeepFCN(widths, num_classes, dropout=dropout, batch_norm=batch_norm)
