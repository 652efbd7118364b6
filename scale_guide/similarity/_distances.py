"""Gram matrix of rows -> distances between the rows, and the correlation of two such matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from scale_guide.similarity import _moments

COINCIDENT = 16.0
"""Rows whose squared distance is below this many rounding errors of |x_i|^2 + |x_j|^2 count as one and the same."""
CONSTANT = 32.0
"""Numbers that differ by fewer rounding errors than this are a constant."""


def squared(K: Tensor) -> Tensor:
    """Returns |x_i - x_j|^2 [n, n] from the Gram matrix K of the rows; 0 with zero gradient where rows coincide."""
    norms = K.diagonal()
    size = norms[:, None] + norms
    distances = torch.sub(size, K, alpha=2)
    rounding = COINCIDENT * torch.finfo(K.dtype).eps
    return distances.masked_fill(distances <= rounding * size, 0)


def itself(K: Tensor) -> Tensor:
    """Returns True on the diagonal [n, n]: a row and itself."""
    return torch.eye(K.shape[0], dtype=torch.bool, device=K.device)


def correlation(U: Tensor, V: Tensor) -> Tensor:
    """Returns Pearson's correlation over i < j of two symmetric matrices [n, n] of zero diagonal.

    Where one of them is constant it is 0, with zero gradient.
    """
    (u, uu), (v, vv) = _deviations(U), _deviations(V)
    return _moments.ratio((u * v).sum(), uu, vv)


def _deviations(U: Tensor) -> tuple[Tensor, Tensor]:
    """Returns U less its mean off the diagonal, and the sum of its squares, 0 where those are mere rounding."""
    n = U.shape[0]
    deviations = (U - U.sum() / (n * (n - 1))).masked_fill(itself(U), 0)
    energy = deviations.square().sum()
    rounding = (CONSTANT * torch.finfo(U.dtype).eps) ** 2 * U.square().sum()
    return deviations, energy.masked_fill(energy <= rounding, 0)
