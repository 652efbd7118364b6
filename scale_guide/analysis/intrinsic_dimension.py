"""Intrinsic dimension of a layer's rows by TwoNN (Facco et al. 2017), as Ansuini et al. 2019 use it for networks.

Where the density of the rows is even on the scale of two neighbours, the ratio mu = r2 / r1 of the distances to the
second and the first neighbour follows F(mu) = 1 - mu^-d. So d is the slope of -log(1 - F) over log mu.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from scale_guide.engine import Engine
from scale_guide.rows import Selected
from scale_guide.statistics.gram import gram_of

KEPT_SHARE = 0.9
"""Share of the ratios that the line is fitted to: the largest are the noisiest (Facco et al. leave out a tenth)."""
MAX_POINTS = 512
"""Rows that an estimate is made from: its time grows with their square, and it changes little from there on."""
MAX_BYTES = 2 * 2**30
"""Rows of all layers that are kept at most, over all ranks: of ResNet-18 at 224 x 224 these are 240."""


def two_nn(rows: Tensor) -> float:
    """Returns the intrinsic dimension of rows [n, d]; NaN with fewer than 3 different ones.

    A row with a copy of itself among the others is left out: it has no ratio.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    gram = gram_of(rows, dtype=dtype).double()
    norms = gram.diagonal()
    scale = norms[:, None] + norms
    squares = (scale - 2 * gram).fill_diagonal_(math.inf)
    squares[squares < 32 * torch.finfo(dtype).eps * scale] = 0  # rounding leaves two equal rows this far apart
    first, second = squares.topk(2, dim=1, largest=False).values.T if len(rows) > 2 else squares.new_zeros(2, 0)
    ratios = (second / first)[first > 0].sort().values
    x = ratios[: int(KEPT_SHARE * len(ratios))].log() / 2
    y = -torch.log1p(-torch.arange(1, len(x) + 1).to(x) / len(ratios))
    return float(x @ y / (x @ x)) if (x > 0).any() else math.nan


class Points:
    """Rows of some layers, kept on the host until all ranks have theirs.

    Args:
        num_points: Rows to keep of each layer, over all ranks: those at the first so many positions.
    """

    def __init__(self, num_points: int) -> None:
        self.num_points = num_points
        self._kept: dict[tuple[str, str], list[Tensor]] = {}

    @classmethod
    def within_memory(cls, num_rows: int, width: int) -> Points:
        """Returns a keeper of as many of `num_rows` rows as fit MAX_BYTES, all layers having `width` columns."""
        return cls(min(num_rows, MAX_BYTES // (4 * max(width, 1))))

    def keep(self, network: str, read: Mapping[str, Selected], positions: Tensor) -> None:
        """Keeps those rows [b, d] of each layer whose positions [b] are below `num_points`."""
        kept = positions < self.num_points
        for layer, (rows, *_) in read.items() if kept.any() else ():
            self._kept.setdefault((network, layer), []).append(rows[kept.to(rows.device)].cpu())

    def dimension(self, network: str, layer: str, engine: Engine) -> float:
        """Returns the intrinsic dimension of a layer, whose rows are then dropped. Collective: call on every rank."""
        everyone = engine.gather_list(self._kept.pop((network, layer), []))
        return two_nn(torch.cat(everyone).to(engine.device)) if everyone else math.nan
