"""Linear CKA with the unbiased estimator of HSIC: over random re-pairings of the rows it averages to about 0.

n(n-3) HSIC1 = <K,L> - n/(n-2) sum(a b) + sum(a) sum(b) / ((n-1)(n-2)) with a_i = |x_i|^2, b_i = |y_i|^2 of centred
rows (Song et al. 2012, rewritten for centred rows; DESIGN 3). Can be negative. Needs n > 3 rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scale_guide.similarity import Preparation, _moments
from scale_guide.similarity._moments import Moments, Norms

ROWS: Preparation = "centre"
NORMS = True


def gram(K: Tensor, L: Tensor) -> Tensor:
    """Returns debiased CKA, a scalar, from the Gram matrices K and L [n, n] of centred rows."""
    return of_moments(_moments.of_grams(K, L))


def feature(A: Tensor, C: Tensor, D: Tensor, norms: Norms) -> Tensor:
    """Returns debiased CKA, a scalar, from A [p, p], C [p, q], D [q, q] and the norms' sums; equal to `gram`."""
    return of_moments(_moments.of_features(A, C, D, norms))


def of_moments(moments: Moments) -> Tensor:
    """Returns debiased CKA from a pair's moments. Only the denominators are clamped: they are squares in the mean."""
    n = moments.num_rows
    unbiased = moments.inner - n / (n - 2) * moments.diagonals + moments.traces / ((n - 1) * (n - 2))
    tiny = torch.finfo(unbiased.dtype).eps * moments.inner.detach()
    return _moments.ratio(unbiased[0], *unbiased[1:].clamp_min(tiny[1:]))
