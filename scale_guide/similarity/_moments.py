"""The few scalars of a layer pair that every estimator of CKA, and its null floor, is made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Norms(NamedTuple):
    """Sums over the n valid rows of products of squared norms a_i = |x_i|^2, b_i = |y_i|^2 of the prepared rows."""

    num_rows: int
    product: Tensor
    target_square: Tensor
    guide_square: Tensor


class Moments(NamedTuple):
    """Of K and L, each divided by its trace; every field is a vector [3] of target x guide, target^2 and guide^2.

    CKA ignores scale, and after the division neither a fp32 overflow (activations of 1e5) nor an underflow is near. A
    layer without spread has all-zero moments; any other has trace 1.

    Attributes:
        num_rows: n.
        inner: <K,L>, <K,K>, <L,L>.
        diagonals: The same of their diagonals.
        traces: Products of their traces.
    """

    num_rows: int
    inner: Tensor
    diagonals: Tensor
    traces: Tensor


def _products(x: Tensor, y: Tensor) -> Tensor:
    """Returns x y, x^2 and y^2 in one tensor [3, ...]."""
    return torch.stack([x * y, x.square(), y.square()])


def _inverse(traces: Tensor) -> Tensor:
    traces = traces.detach()
    return traces.masked_fill(traces == 0, 1).reciprocal()


def unit_trace(K: Tensor) -> Tensor:
    """Returns K [n, n] over its trace, which counts as a constant; a zero matrix stays zero.

    For similarities that ignore scale: their gradient is the same, and squares of K neither overflow nor underflow.
    """
    return K * _inverse(K.diagonal().sum())


def centred(K: Tensor) -> Tensor:
    """Returns H K H [n, n], H = I - 11'/n: the Gram matrix of the rows (of a kernel: its features) less the mean."""
    return K - K.mean(dim=0) - K.mean(dim=1, keepdim=True) + K.mean()


def of_grams(K: Tensor, L: Tensor) -> Moments:
    """Returns the moments of a pair from its Gram matrices K, L [n, n] of prepared rows."""
    K, L = unit_trace(K), unit_trace(L)
    a, b = K.diagonal(), L.diagonal()
    inner = torch.stack([(K * L).sum(), K.square().sum(), L.square().sum()])
    return Moments(K.shape[0], inner, _products(a, b).sum(dim=1), _products(a.sum(), b.sum()))


def of_features(A: Tensor, C: Tensor, D: Tensor, norms: Norms | None = None) -> Moments:
    """Returns the moments of a pair from A [p, p], C [p, q], D [q, q]; without `norms` the diagonals' are zero."""
    traces = torch.stack([A.diagonal().sum(), D.diagonal().sum()])
    x, y = inverses = _inverse(traces)
    inner = torch.stack([(C * (x * y).sqrt()).square().sum(), (A * x).square().sum(), (D * y).square().sum()])
    products = _products(*(traces * inverses))
    if norms is None:
        return Moments(0, inner, torch.zeros_like(inner), products)
    diagonals = torch.stack([norms.product, norms.target_square, norms.guide_square])
    out_of_range = _out_of_range(norms.num_rows, diagonals[1:], traces).any()
    # One factor after the other: the square of the inverse of a large trace underflows.
    scaled = diagonals * inverses[[0, 0, 1]] * inverses[[1, 0, 1]]
    return Moments(norms.num_rows, inner, scaled.masked_fill(out_of_range, torch.nan), products)


def _out_of_range(n: int, squares: Tensor, traces: Tensor) -> Tensor:
    """Returns whether sums a^2, fourth powers of the rows, left the number format although the sums a did not.

    In fp32 that happens below 1e-9 and above 1e9. It shows: n sum a^2 is never less than (sum a)^2.
    """
    squares, traces = squares.detach(), traces.detach()
    below = (squares < torch.finfo(squares.dtype).tiny) | (n * squares < 0.99 * traces.square())
    return (below & (traces != 0)) | ~squares.isfinite()


def ratio(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """Returns xy / sqrt(xx yy), and 0 with zero gradient where xx or yy is not positive. NaN stays NaN."""
    dead = (xx <= 0) | (yy <= 0)
    scale = xx.masked_fill(dead, 1).sqrt() * yy.masked_fill(dead, 1).sqrt()
    return xy.masked_fill(dead, 0) / scale


def null_floor(moments: Moments) -> Tensor:
    """Returns what CKA averages to over random re-pairings of the rows: tr K tr L / ((n - 1) |K| |L|) (DESIGN 1)."""
    _, xx, yy = moments.inner
    live = (xx > 0) & (yy > 0)
    return ratio(live.to(xx.dtype), xx, yy) / (moments.num_rows - 1)
