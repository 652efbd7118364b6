"""What the statistics storey hands up and takes back: second-order matrices keyed by layer, and their precision."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scale_guide.statistics.plan import Node, Pair

ZERO_VARIANCE = 32.0
"""A layer that spreads by fewer rounding errors of its mean than this has no geometry: its matrices become zero."""


@dataclass
class Matrices:
    """The statistics of one global batch, equal on every rank; or the gradients of a scalar with respect to them.

    A target layer has K (Gram form) or A (feature form), a guide layer L or D, a pair C. With a_i = |x_i|^2 and
    b_i = |y_i|^2 of the prepared rows, `squares` holds sum a_i^2 per layer and `products` sum a_i b_i per pair: what
    unbiased estimators in feature form need besides A, C, D (empty in Gram form, or when not asked for).

    Attributes:
        num_rows: n, valid rows of the global batch.
        grams: Layer -> K or L [n, n].
        features: Layer -> A [p, p] or D [q, q].
        crosses: Pair -> C [p, q].
        squares: Layer -> scalar.
        products: Pair -> scalar.
    """

    num_rows: int
    grams: dict[Node, Tensor] = field(default_factory=dict)
    features: dict[Node, Tensor] = field(default_factory=dict)
    crosses: dict[Pair, Tensor] = field(default_factory=dict)
    squares: dict[Node, Tensor] = field(default_factory=dict)
    products: dict[Pair, Tensor] = field(default_factory=dict)

    def of_target(self) -> list[Tensor]:
        """Returns every tensor that depends on target rows, in one fixed order."""
        by_layer = [self.grams, self.features, self.squares]
        own = [value for table in by_layer for (side, _), value in table.items() if side == "target"]
        return [*own, *self.crosses.values(), *self.products.values()]

    def gradients(self, total: Tensor) -> Matrices:
        """Returns d(total) / d(each tensor of the target) under the same keys; zero where it does not depend on it."""
        leaves = self.of_target()
        grads = iter(torch.autograd.grad(total, leaves, materialize_grads=True))
        result = Matrices(self.num_rows)
        for mine, theirs in (
            (self.grams, result.grams),
            (self.features, result.features),
            (self.squares, result.squares),
        ):
            theirs.update({node: next(grads) for node in mine if node[0] == "target"})
        result.crosses.update({pair: next(grads) for pair in self.crosses})
        result.products.update({pair: next(grads) for pair in self.products})
        return result


def without_spread(trace: Tensor, mean_energy: Tensor) -> Tensor:
    """Returns whether the centred energy `trace` is mere rounding beside the mean's, `mean_energy` = n |mean|^2."""
    return trace <= (ZERO_VARIANCE * torch.finfo(trace.dtype).eps) ** 2 * mean_energy


def add_symmetric(matrix: Tensor, rows: Tensor) -> Tensor:
    """Returns `matrix` [n, n] with rows @ rows.T added in place, rows [n, d]: one triangle is multiplied.

    With eight blocks that is 9/16 of the products of a plain matrix product.
    """
    n = rows.shape[0]
    height = max(128, math.ceil(n / 8))
    for i in range(0, n, height):
        j = min(i + height, n)
        matrix[i:j, i:].addmm_(rows[i:j], rows[i:].T)
        matrix[j:, i:j] = matrix[i:j, j:].T
    return matrix


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Turns autocast and TF32 off: under autocast `x.float() @ x.float().T` would come back in bf16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
