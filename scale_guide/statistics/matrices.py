"""What the statistics storey hands up and takes back: second-order matrices keyed by layer, and their precision."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

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

    @property
    def device(self) -> torch.device:
        """Where the matrices are."""
        return next(iter([*self.grams.values(), *self.features.values()])).device

    def of_target(self, pair: Pair) -> dict[tuple[str, Node | Pair], Tensor]:
        """Returns the tensors of a pair that depend on target rows, by table and key."""
        node = pair.nodes[0]
        places: list[tuple[str, Node | Pair]] = [("grams", node), ("features", node), ("squares", node)]
        places += [("crosses", pair), ("products", pair)]
        return {(table, key): getattr(self, table)[key] for table, key in places if key in getattr(self, table)}

    def add_gradients(self, total: Tensor, of: Matrices, pair: Pair) -> None:
        """Adds to these, under the same keys, d(total) / d(each tensor of a pair's target in `of`).

        Where `total` does not depend on it that is zero; `squares` and `products` then get no entry.
        """
        leaves = of.of_target(pair)
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        gradients = cast("Sequence[Tensor | None]", found)
        for ((table, key), leaf), gradient in zip(leaves.items(), gradients, strict=True):
            sums = getattr(self, table)
            if gradient is not None:
                sums[key] = gradient if key not in sums else sums[key] + gradient
            elif table not in ("squares", "products"):
                sums.setdefault(key, torch.zeros_like(leaf))


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
    # Only where it changes something: even setting it to what it is makes torch.compile compile once more.
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)
