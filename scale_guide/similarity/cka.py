"""Linear centred kernel alignment, the biased estimator: the papers' similarity.

CKA = <K, L> / (|K| |L|) = |C|^2 / (|A| |D|), in 0..1; 1 for rows equal up to rotation and scale. The 1/(n-1)^2 of
HSIC cancels (Kornblith et al. 2019; PAPER.md section 3).
"""

from __future__ import annotations

from torch import Tensor

from scale_guide.similarity import Preparation, _moments

ROWS: Preparation = "centre"


def gram(K: Tensor, L: Tensor) -> Tensor:
    """Returns CKA, a scalar, from the Gram matrices K and L [n, n] of centred rows. A layer without spread gives 0."""
    moments = _moments.of_grams(K, L)
    return _moments.ratio(*moments.inner)


def feature(A: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Returns CKA, a scalar, from A [p, p], C [p, q] and D [q, q] of centred rows; equal to `gram`."""
    moments = _moments.of_features(A, C, D)
    return _moments.ratio(*moments.inner)
