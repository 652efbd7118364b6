"""Fully connected networks: what Deep FCN and Wide FCN have in common (PAPER.md section 2)."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

from torch import Tensor, nn


class FCN(nn.Module):
    """Hidden blocks of Linear, BatchNorm, ReLU, Dropout, `widths` apart, then a Linear to the logits."""

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
