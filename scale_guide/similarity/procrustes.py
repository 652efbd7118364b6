"""Procrustes similarity: how far the best rotation turns the target's rows onto the guide's.

|X'Y|_* / (|X|_F |Y|_F) of centred rows, the nuclear norm over both lengths (Schoenemann 1966; the cosine of the
angular shape distance, Williams et al. 2021), in 0..1; 1 for rows equal up to rotation, translation and scale. |X'Y|_*
is the sum of the roots of the eigenvalues of L^(1/2) K L^(1/2), or of the singular values of C.

Squaring costs half the digits: with K in fp32, roots of eigenvalues below 1e-6 of the largest are rounding errors, of
which a large batch has thousands. They count as 0, without gradient, in both forms and in every precision, so that
there is one number. Equal rows therefore reach 1 less the share of their variance in directions that have under 1e-3
of that of the strongest. Costs two eigendecompositions in fp64, about 20 n^3 operations; in fp32 their own errors
would leave the gradient 2 digits (9e-3 at n = 1,024, for 4e-6).
"""

from __future__ import annotations

import torch
from torch import Tensor

from scale_guide.similarity import Preparation, _moments

ROWS: Preparation = "centre"
CUT = 1e-6
"""Squared singular values of X'Y below this share of the largest count as 0."""


def gram(K: Tensor, L: Tensor) -> Tensor:
    """Returns the similarity, a scalar, from K and L [n, n] of centred rows. A layer without spread gives 0."""
    dtype, K, L = K.dtype, _moments.unit_trace(K.double()), _moments.unit_trace(L.detach().double())
    spread, total = K.diagonal().sum(), L.diagonal().sum()
    # A decomposition of NaN is an error of LAPACK that names nothing: NaN in, NaN out.
    good = (K.sum() + L.sum()).isfinite()
    with torch.no_grad():
        values, vectors = torch.linalg.eigh(L.where(good, 0))
        root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    squares = torch.linalg.eigvalsh(root @ K.where(good, 0) @ root)
    kept = squares > CUT * squares.detach().amax()
    nuclear = squares.where(kept, 1).sqrt().where(kept, 0).sum()
    return _moments.ratio(nuclear, spread, total).masked_fill(~good, torch.nan).to(dtype)


def feature(A: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Returns the same from A [p, p], C [p, q] and D [q, q] of centred rows."""
    spread, total = A.diagonal().sum(), D.diagonal().sum()
    good = (spread + total + C.sum()).isfinite()
    values = torch.linalg.svdvals(C.where(good, 0))
    nuclear = values.where(values > CUT**0.5 * values.detach().amax(), 0).sum()
    return _moments.ratio(nuclear, spread, total).masked_fill(~good, torch.nan)
