"""Matrices -> scalar: pure torch on small replicated tensors, ordinary autograd, no process group in sight.

A file is a similarity, here or in a file of your own (`guidance.similarity: ./my_similarity.py`). It holds

    ROWS              how its rows are prepared, see `Preparation`
    gram(K, L)        the similarity, a scalar, from the Gram matrices [n, n] of all prepared rows of the global batch
    feature(A, C, D)  optional: the same number from A = X'X [p, p], C = X'Y [p, q], D = Y'Y [q, q]

Gradient is taken with respect to K, or A and C, by ordinary autograd; the guide's L and D need none. With `NORMS =
True` the feature form takes a fourth argument, `_moments.Norms`: n and the sums of products of squared row norms. A
feature form is used by similarities that centre alone: A, C, D of rows that are not centred do not hold their mean,
which the debiased value and the null floor logged beside every similarity need, and a Gram matrix does.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

Preparation: TypeAlias = Literal["none", "centre", "unit", "unit_centre"]
"""none: raw rows. centre: less their mean over the global batch. unit: each divided by its length. unit_centre: of
unit length first, then centred, so 1 - cosine of two rows is half their squared distance."""
