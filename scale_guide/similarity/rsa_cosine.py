"""Representational similarity analysis on cosine distances: do the same pairs of rows lie far apart in both layers?

Pearson's correlation over i < j of the two matrices of 1 - cos(row_i, row_j) (Kriegeskorte et al. 2008), in -1..1; 1
for rows equal up to rotation and the length of each row. Pearson's and not Spearman's, because ranks have no gradient.
1 - cos is half the squared distance of unit rows, which centring leaves as it is and makes precise where all rows
point about the same way. Squared distances are linear in the Gram matrix, so there is a feature form, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scale_guide.similarity import Preparation, _distances, _moments

ROWS: Preparation = "unit_centre"
NORMS = True


def gram(K: Tensor, L: Tensor) -> Tensor:
    """Returns the correlation of the distances, a scalar, from K and L [n, n] of centred unit rows. A constant: 0."""
    K, L = _moments.unit_trace(K), _moments.unit_trace(L)
    return _distances.correlation(_distances.squared(K), _distances.squared(L))


def feature(A: Tensor, C: Tensor, D: Tensor, norms: _moments.Norms) -> Tensor:
    """Returns the same from A [p, p], C [p, q], D [q, q] and the norms' sums.

    With a_i = |x_i|^2, b_i = |y_i|^2 and m the mean over i != j, of centred rows

        sum over i, j of (a_i + a_j - 2 K_ij)(b_i + b_j - 2 L_ij) = 2n sum(a b) + 2 sum(a) sum(b) + 4 <K, L>
        n (n - 1) m_x m_y = 4n sum(a) sum(b) / (n - 1)
    """
    moments = _moments.of_features(A, C, D, norms)
    n = moments.num_rows
    whole = 2 * n * moments.diagonals + 4 * moments.inner
    covariances = whole - 2 * (n + 1) / (n - 1) * moments.traces
    rounding = _distances.CONSTANT * torch.finfo(A.dtype).eps * whole[1:]
    return _moments.ratio(covariances[0], *covariances[1:].masked_fill(covariances[1:] <= rounding, 0))
