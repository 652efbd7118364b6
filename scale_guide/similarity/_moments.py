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
    """Of K and L, each divided by its trace: <K,L>, <K,K>, <L,L>, the same for their diagonals, and the traces.

    CKA ignores scale, and after the division neither a fp32 overflow (activations of 1e5) nor an underflow is near. A
    layer without spread has all-zero moments; any other has trace 1.
    """

    num_rows: int
    xy: Tensor
    xx: Tensor
    yy: Tensor
    product: Tensor
    target_square: Tensor
    guide_square: Tensor
    target_trace: Tensor
    guide_trace: Tensor


def _inverse(trace: Tensor) -> Tensor:
    trace = trace.detach()
    return torch.where(trace == 0, torch.ones_like(trace), trace).reciprocal()


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
    inner = ((K * L).sum(), K.square().sum(), L.square().sum())
    return Moments(K.shape[0], *inner, (a * b).sum(), a.square().sum(), b.square().sum(), a.sum(), b.sum())


def of_features(A: Tensor, C: Tensor, D: Tensor, norms: Norms | None = None) -> Moments:
    """Returns the moments of a pair from A [p, p], C [p, q], D [q, q]; without `norms` the diagonals' are zero."""
    traces = A.diagonal().sum(), D.diagonal().sum()
    x, y = _inverse(traces[0]), _inverse(traces[1])
    xy, xx, yy = (C * (x * y).sqrt()).square().sum(), (A * x).square().sum(), (D * y).square().sum()
    zero = torch.zeros_like(xy)
    if norms is None:
        return Moments(0, xy, xx, yy, zero, zero, zero, traces[0] * x, traces[1] * y)
    n, product, target, guide = norms
    out_of_range = _out_of_range(n, target, traces[0]) | _out_of_range(n, guide, traces[1])
    one = torch.ones_like(zero).masked_fill(out_of_range, torch.nan)
    diagonals = (product * x * y * one, target * x.square() * one, guide * y.square() * one)
    return Moments(n, xy, xx, yy, *diagonals, traces[0] * x, traces[1] * y)


def _out_of_range(n: int, square: Tensor, trace: Tensor) -> Tensor:
    """Returns whether sum a^2, a fourth power of the rows, left the number format although sum a did not.

    In fp32 that happens below 1e-9 and above 1e9. It shows: n sum a^2 is never less than (sum a)^2.
    """
    square, trace = square.detach(), trace.detach()
    below = (square < torch.finfo(square.dtype).tiny) | (n * square < 0.99 * trace.square())
    return (below & (trace != 0)) | ~square.isfinite()


def ratio(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """Returns xy / sqrt(xx yy), and 0 with zero gradient where xx or yy is not positive. NaN stays NaN."""
    dead = (xx <= 0) | (yy <= 0)
    one = torch.ones_like(xx)
    scale = torch.where(dead, one, xx).sqrt() * torch.where(dead, one, yy).sqrt()
    return torch.where(dead, torch.zeros_like(xy), xy) / scale


def null_floor(moments: Moments) -> Tensor:
    """Returns what CKA averages to over random re-pairings of the rows: tr K tr L / ((n - 1) |K| |L|) (DESIGN 1)."""
    live = (moments.xx > 0) & (moments.yy > 0)
    return ratio(live.to(moments.xx.dtype), moments.xx, moments.yy) / (moments.num_rows - 1)
