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


def of_grams(K: Tensor, L: Tensor) -> Moments:
    """Returns the moments of a pair from its Gram matrices K, L [n, n] of prepared rows."""
    K, L = K * _inverse(K.diagonal().sum()), L * _inverse(L.diagonal().sum())
    a, b = K.diagonal(), L.diagonal()
    inner = ((K * L).sum(), K.square().sum(), L.square().sum())
    return Moments(K.shape[0], *inner, (a * b).sum(), a.square().sum(), b.square().sum(), a.sum(), b.sum())


def of_features(A: Tensor, C: Tensor, D: Tensor, norms: Norms | None = None) -> Moments:
    """Returns the moments of a pair from A [p, p], C [p, q], D [q, q]; without `norms` the diagonals' are zero."""
    traces = A.diagonal().sum(), D.diagonal().sum()
    x, y = _inverse(traces[0]), _inverse(traces[1])
    xy, xx, yy = (C * (x * y).sqrt()).square().sum(), (A * x).square().sum(), (D * y).square().sum()
    zero = torch.zeros_like(xy)
    n, product, target, guide = norms or Norms(0, zero, zero, zero)
    diagonals = (product * x * y, target * x.square(), guide * y.square())
    return Moments(n, xy, xx, yy, *diagonals, traces[0] * x, traces[1] * y)


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
