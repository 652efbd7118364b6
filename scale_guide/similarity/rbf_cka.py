"""CKA of Gaussian kernels: like linear CKA, but near rows count and far ones hardly do.

k(x_i, x_j) = exp(-|x_i - x_j|^2 / (2 sigma^2)) with sigma = BANDWIDTH times the median distance over i < j of each
side's own rows (Kornblith et al. 2019, section 3), then centred, biased CKA; in 0..1, 1 for rows equal up to rotation,
translation and scale. The median (the lower of two) is part of the function: the gradient goes through it, to one
pair. A layer more than half of whose pairs coincide has median 0 and no kernel: similarity 0, without gradient.
"""

from __future__ import annotations

from torch import Tensor

from scale_guide.similarity import Preparation, _distances, _moments

ROWS: Preparation = "centre"
BANDWIDTH = 0.8
"""sigma over the median distance: the widest of the three that Kornblith et al. tried (0.2, 0.4, 0.8)."""


def gram(K: Tensor, L: Tensor) -> Tensor:
    """Returns CKA of the kernels, a scalar, from K and L [n, n] of centred rows. A layer without spread gives 0."""
    moments = _moments.of_grams(_kernel(K), _kernel(L))
    return _moments.ratio(*moments.inner)


def _kernel(K: Tensor) -> Tensor:
    n = K.shape[0]
    squared = _distances.squared(_moments.unit_trace(K))
    # Rows of n + 1 shift the diagonal into the last column; what is left holds every distance twice.
    median = squared.flatten()[1:].view(n - 1, n + 1)[:, :-1].median()
    dead = median <= 0
    kernel = (squared / (-2 * BANDWIDTH**2 * median.masked_fill(dead, 1))).exp()
    return _moments.centred(kernel).masked_fill(dead, 0)
