"""How well ridge regression on the target's rows predicts each guide row that it has not seen: held-out R^2.

1 - sum_i |y_i - ridge fitted without row i|^2 / sum_i |y_i - mean of the others|^2: at most 1, 0 for no better than
the mean, negative for worse. Invariant to rotation, translation and scale of either side, but not symmetric: a target
that holds more than the guide is not punished for it. Equal rows reach less than 1, for ridge shrinks.

Every row is held out once, not one fixed block: the order of the rows in K follows ranks and micro-batches, so a block
would be other rows, and the similarity another number, for every launch. Leaving one out has a closed form (Allen
1974, PRESS; Golub, Heath and Wahba 1979). With centred K, lambda = RELATIVE_LAMBDA tr K / n and the hat matrix

    S = 11'/n + K (K + lambda I)^-1,    residual_i = ((I - S) Y)_i / (1 - S_ii)

and Y enters through L alone: |residual_i|^2 = ((I - S) L (I - S))_ii / (1 - S_ii)^2. Costs about 3 n^3 operations, in
fp64: K + lambda I has a condition number of up to n / RELATIVE_LAMBDA, which in fp32 would leave the gradient 2 digits
(3e-3 at n = 1,024, for 4e-4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from scale_guide.similarity import Preparation, _moments

ROWS: Preparation = "centre"
RELATIVE_LAMBDA = 0.1
"""Penalty over the mean eigenvalue of K."""


def gram(K: Tensor, L: Tensor) -> Tensor:
    """Returns held-out R^2, a scalar, from K and L [n, n] of centred rows. A layer without spread gives 0."""
    n, dtype = K.shape[0], K.dtype
    K, L = _moments.unit_trace(K.double()), _moments.unit_trace(L.double())
    spread, total = K.diagonal().sum(), L.diagonal().sum()
    dead = (spread <= 0) | (total <= 0)
    penalty = RELATIVE_LAMBDA * spread.masked_fill(dead, 1) / n
    # (I - S) L (I - S) = lambda^2 M L M, because K and L are centred; `failed` says that K holds NaN or inf.
    factor, failed = torch.linalg.cholesky_ex(K + penalty * torch.eye(n, dtype=K.dtype, device=K.device))
    inverse = torch.cholesky_inverse(factor)
    held_out = penalty * inverse.diagonal() - 1 / n
    unexplained = penalty.square() * ((inverse @ L) * inverse).sum(dim=1) / held_out.square()
    mean_alone = total.masked_fill(dead, 1) * (n / (n - 1)) ** 2
    similarity = (1 - unexplained.sum() / mean_alone).masked_fill(dead, 0)
    return similarity.masked_fill(failed != 0, torch.nan).to(dtype)
