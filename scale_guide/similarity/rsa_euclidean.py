"""Representational similarity analysis on Euclidean distances: do the same pairs of rows lie far apart in both layers?

Pearson's correlation over i < j of the two matrices of |row_i - row_j| (Kriegeskorte et al. 2008), in -1..1; 1 for
rows equal up to rotation, translation and scale. Pearson's and not Spearman's, because ranks have no gradient. Rows
that coincide within rounding have distance 0 and take no gradient from it, where the square root has none.
"""

from __future__ import annotations

from torch import Tensor

from scale_guide.similarity import Preparation, _distances, _moments

ROWS: Preparation = "centre"


def gram(K: Tensor, L: Tensor) -> Tensor:
    """Returns the correlation of the distances, a scalar, from K and L [n, n] of centred rows. A constant gives 0."""
    return _distances.correlation(_apart(K), _apart(L))


def _apart(K: Tensor) -> Tensor:
    squared = _distances.squared(_moments.unit_trace(K))
    zero = squared == 0
    return squared.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
