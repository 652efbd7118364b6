"""The ways of computing linear CKA over ranks that bench_similarity.py times, and what each is expected to cost.

Ours; two baselines written here (the usual differentiable gather, and the authors' way: a gather without gradient, the
own slice put back, CKA by H K H); and peers from PyPI (the `bench` extra), each of whose own CKA function is called on
the gathered rows. Where such a function cuts the graph, or calls `.item()`, it is timed for its value only, against
our value only; debiased ones are timed against our debiased CKA.

ckatorch 1.0.3, pytorch-cka 1.1.3 and torch-cka 0.21 have a CKA of two matrices. anatome is not on PyPI; torchdistill
1.1.5 has no CKA, and neither have lightly, open-clip-torch or sentence-transformers: they are not compared here.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from bench_processes import gather, gather_without_gradient
from torch import Tensor, nn

from scale_guide import linear_cka
from scale_guide.statistics import LAYOUTS, Layout, Pair, make_plan

Gradient = Literal["exact", "1/W", "value only"]
AUTO = "scale_guide auto"


class Size(NamedTuple):
    """A point of the benchmark: N rows in all, widths p and q, W processes."""

    n: int
    p: int
    q: int
    w: int

    @classmethod
    def of(cls, text: str, w: int) -> Size:
        """Returns the size written as N,p,q on w processes."""
        n, p, q = (int(number) for number in text.split(","))
        return cls(n, p, q, w)

    @property
    def b(self) -> int:
        """Rows per rank."""
        return self.n // self.w

    def __str__(self) -> str:
        return f"W={self.w} N={self.n:,} p={self.p:,} q={self.q:,}"


class Cost(NamedTuple):
    """What a method is expected to take on a rank; roughly, and rather too much: it decides what is left out.

    Attributes:
        flops: Multiplications and additions of fp32 matrix products; those of float64 count twice.
        wire: fp32 elements handed to collectives, forward and backward.
        touched: fp32 elements read or written outside matrix products.
        held: fp32 elements at the worst moment, besides x, y and the gradient of x.
    """

    flops: float
    wire: float
    touched: float
    held: float


@dataclass(frozen=True)
class Method:
    """One way of computing CKA, loss and gradient, of this rank's rows x [b, p] and y [b, q].

    Attributes:
        name: In the table.
        call: x, y -> CKA over the rows of all ranks, a scalar. Collective.
        cost: Expected, at a size.
        estimator: biased or debiased.
        gradient: exact; 1/W of the true one; or value only.
        package: The module a peer needs; empty for ours and for the baselines.
    """

    name: str
    call: Callable[[Tensor, Tensor], Tensor]
    cost: Callable[[Size], Cost]
    estimator: Literal["biased", "debiased"] = "biased"
    gradient: Gradient = "exact"
    package: str = ""

    @property
    def reference(self) -> str:
        """Name of the way of ours that gives the same: the method's time is divided by its time."""
        debiased = ", debiased" if self.estimator == "debiased" else ""
        return AUTO + debiased + (", value only" if self.gradient == "value only" else "")

    @property
    def ours(self) -> bool:
        """Whether it is this package's."""
        return self.name.startswith("scale_guide")

    @property
    def layout(self) -> str:
        """The layout it forces; empty for anything else."""
        last = self.name.split()[-1]
        return last if self.ours and last in LAYOUTS else ""

    def load(self) -> None:
        """Imports its package, if it is there: seconds that belong to no point."""
        if self.package and self.installed:
            importlib.import_module(self.package)

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return not self.package or importlib.util.find_spec(self.package) is not None


def methods() -> dict[str, Method]:
    """Returns every way that is timed, by the name it has in the table."""
    return {method.name: method for group in (_ours(), _baselines(), _peers()) for method in group}


def chosen_layout(size: Size) -> Layout:
    """Returns the layout that auto takes."""
    pair = Pair("x", "y")
    widths = {pair.nodes[0]: size.p, pair.nodes[1]: size.q}
    return make_plan([pair], widths, size.n, size.w, {"gram", "feature"}).parts[0].layout


def _ours() -> Iterator[Method]:
    def cost_of_auto(size: Size) -> Cost:
        return _layout_cost(chosen_layout(size), size)

    yield Method(AUTO, lambda x, y: linear_cka(x, y), cost_of_auto)
    yield Method(f"{AUTO}, debiased", lambda x, y: linear_cka(x, y, estimator="debiased"), cost_of_auto, "debiased")
    yield Method(f"{AUTO}, value only", lambda x, y: linear_cka(x, y), cost_of_auto, gradient="value only")
    yield Method(
        f"{AUTO}, debiased, value only",
        lambda x, y: linear_cka(x, y, estimator="debiased"),
        cost_of_auto,
        "debiased",
        "value only",
    )
    for name in LAYOUTS:
        yield Method(
            f"scale_guide {name}",
            lambda x, y, name=name: linear_cka(x, y, layout=name),
            lambda size, name=name: _layout_cost(name, size),
        )


def _baselines() -> Iterator[Method]:
    yield Method("gather + autograd, Gram", lambda x, y: gram_cka(gather(x), gather(y)), lambda s: _gathered(s, 4, 12))
    yield Method("gather + autograd, covariance", lambda x, y: feature_cka(gather(x), gather(y)), _feature_cost)
    yield Method(
        "own slice put back, H K H",
        lambda x, y: hkh_cka(gather_without_gradient(x), gather_without_gradient(y)),
        lambda s: _gathered(s, 4, 16, cubes=12),
        gradient="1/W",
    )


def _peers() -> Iterator[Method]:
    def ckatorch(function: str) -> Callable[..., Tensor]:
        return getattr(importlib.import_module("ckatorch"), function)  # type: ignore[no-any-return]

    yield Method(
        "ckatorch cka_base (default)",
        lambda x, y: ckatorch("cka_base")(gather(x), gather(y)),
        lambda s: _gathered(s, 0, 16, double=True),
        gradient="value only",
        package="ckatorch",
    )
    yield Method(
        "ckatorch cka_base (hsic)",
        lambda x, y: ckatorch("cka_base")(gather(x), gather(y), method="hsic"),
        lambda s: _gathered(s, 4, 28, cubes=9, double=True),
        package="ckatorch",
    )
    yield Method(
        "ckatorch cka_batch",
        lambda x, y: ckatorch("cka_batch")(gather(x)[None], gather(y)[None]),
        lambda s: _gathered(s, 4, 20, cubes=9, double=True),
        "debiased",
        package="ckatorch",
    )
    yield Method(
        "pytorch-cka cka_from_features",
        lambda x, y: importlib.import_module("cka").cka_from_features(gather(x), gather(y)).squeeze(),
        lambda s: _gathered(s, 4, 14),
        "debiased",
        package="cka",
    )
    yield Method(
        "torch-cka CKA.compare",
        _torch_cka,
        lambda s: _gathered(s, 0, 6, cubes=3),
        "debiased",
        "value only",
        "torch_cka",
    )


def _torch_cka(x: Tensor, y: Tensor) -> Tensor:
    """CKA of whole batches by torch-cka, which compares models on batches: here two identities on one batch."""
    compared = importlib.import_module("torch_cka").CKA(nn.Identity(), nn.Identity(), "x", "y", [""], [""])
    compared.compare(_OneBatch(gather(x)), _OneBatch(gather(y)))
    return compared.hsic_matrix[0, 0]  # type: ignore[no-any-return]


class _OneBatch:
    """What torch-cka needs of a DataLoader, without the cost of one."""

    dataset = "rows"

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[tuple[Tensor]]:
        yield (self._rows,)


def gram_cka(x: Tensor, y: Tensor) -> Tensor:
    """Returns CKA of whole batches x [N, p], y [N, q] by centred Gram matrices, in ordinary autograd."""
    x, y = x - x.mean(0), y - y.mean(0)
    k, ell = x @ x.T, y @ y.T
    return (k * ell).sum() / (k.square().sum() * ell.square().sum()).sqrt()


def feature_cka(x: Tensor, y: Tensor) -> Tensor:
    """Returns the same by covariances."""
    x, y = x - x.mean(0), y - y.mean(0)
    return (x.T @ y).square().sum() / ((x.T @ x).square().sum() * (y.T @ y).square().sum()).sqrt()


def hkh_cka(x: Tensor, y: Tensor) -> Tensor:
    """Returns CKA as most research code writes it: tr(K H L H) with a centring matrix."""
    n = len(x)
    h = torch.eye(n) - 1 / n
    k, ell = h @ (x @ x.T) @ h, h @ (y @ y.T) @ h
    return (k * ell).sum() / (k.square().sum() * ell.square().sum()).sqrt()


def _layout_cost(layout: Layout, size: Size) -> Cost:
    n, p, q, w = size
    b, squares = size.b, p * p + p * q + q * q
    if layout == "covariance":
        flops = 2 * b * (0.6 * (p * p + q * q) + 2 * p * q + p * p)
        return Cost(flops, squares * (w > 1), 20 * squares + 8 * b * (p + q), 2 * b * (p + q) + 5 * squares)
    if layout == "transpose" and w > 1:
        flops = 2 * b * n * (0.6 * (p + q) + p)
        return Cost(
            flops, b * (2 * p + q) + n * n, 30 * n * n + 8 * b * (p + q), max(4 * b * p, 2 * b * q) + 8 * n * n
        )
    flops = 2 * n * n * 0.6 * (p + q) + 2 * b * n * p
    held = max(n * p + 2 * b * p, (n + b) * q if w > 1 else 0) + b * p + 8 * n * n
    return Cost(flops, n * (p + q) * (w > 1), 30 * n * n + 4 * n * (p + q), held)


def _feature_cost(size: Size) -> Cost:
    n, p, q, _ = size
    squares = p * p + p * q + q * q
    flops = 2 * n * (squares + 2 * p * p + p * q)
    rows = _gathered(size, 0, 0)
    return Cost(flops, rows.wire, rows.touched + 12 * squares, rows.held + 4 * squares)


def _gathered(size: Size, products: int, grams: int, *, cubes: int = 0, double: bool = False) -> Cost:
    """Returns the cost of Gram matrices of gathered rows: `grams` [N, N] held, `cubes` products of two of them.

    Args:
        size: The point.
        products: 4 if the gradient of x is taken, which costs two products of K's size; else 0.
        grams: Matrices [N, N] held at once.
        cubes: Products of two [N, N] matrices.
        double: Whether all of it is in float64.
    """
    n, p, q, w = size
    wide = 2 if double else 1
    flops = wide * (2 * n * n * (p + q) + products * n * n * p + 2 * cubes * n**3) * (grams > 0)
    held = max(2 * n * (p + q), n * ((6 if w > 1 else 3) * p + q) * wide) + wide * grams * n * n
    return Cost(flops, n * (2 * p + q) * (w > 1), wide * (12 * n * (p + q) + 3 * grams * n * n), held)
