"""Soft mutual nearest neighbours: do rows have the same neighbours in both layers? 1 for the same, however far apart.

The mutual k-NN metric (Huh et al. 2024, The Platonic Representation Hypothesis) is the mean over rows of the share of
their k nearest neighbours by cosine that both layers have in common. Counting has no gradient. Relaxed, with s_ij =
cos(row_i, row_j) - 1 and t_i the midpoint between the k-th and the (k+1)-th largest s_ij over j != i,

    p_ij = sigmoid((s_ij - t_i) / (TEMPERATURE std_j s_ij)),    similarity = sum p q / sqrt(sum p^2  sum q^2)

over i != j, q alike from the guide's rows: as TEMPERATURE goes to 0, p_ij becomes 1 for the k nearest and 0 for all
others, and the similarity the metric. Threshold and standard deviation have gradient, too: only the order of a row's
neighbours and their distances relative to each other matter. Invariant to rotation and to the length of each row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scale_guide.similarity import Preparation, _distances, _moments

ROWS: Preparation = "unit_centre"
NUM_NEIGHBOURS = 10
"""k of large batches; never more than half of the other rows."""
TEMPERATURE = 0.1
"""Width of the soft threshold, in standard deviations of a row's similarities."""


def gram(K: Tensor, L: Tensor) -> Tensor:
    """Returns the soft share of common neighbours, a scalar, from K and L [n, n] of centred unit rows."""
    p, q = _memberships(K), _memberships(L)
    return _moments.ratio((p * q).sum(), p.square().sum(), q.square().sum())


def _memberships(K: Tensor) -> Tensor:
    """Returns p [n, n]; zero for a row that is as far from every other, for it has no nearest neighbours."""
    n = K.shape[0]
    k = min(NUM_NEIGHBOURS, (n - 1) // 2)
    itself = _distances.itself(K)
    near = -0.5 * _distances.squared(_moments.unit_trace(K))
    threshold = near.masked_fill(itself, -torch.inf).topk(k + 1, dim=1).values[:, k - 1 :].mean(dim=1, keepdim=True)
    mean = near.sum(dim=1, keepdim=True) / (n - 1)
    variance = (near - mean).masked_fill(itself, 0).square().sum(dim=1, keepdim=True) / (n - 1)
    constant = variance <= (_distances.CONSTANT * torch.finfo(K.dtype).eps * mean).square()
    width = TEMPERATURE * variance.masked_fill(constant, 1).sqrt()
    return ((near - threshold) / width).sigmoid().masked_fill(itself | constant, 0)
