"""Feature statistics: A = X'X, C = X'Y, D = Y'Y of the centred global batch, with memory free of the number of rows.

Each rank sums moments about a shift of its own (the mean of its first micro-batch), so nothing cancels however far
from zero the rows lie. `reduce` sums the means over ranks first (d numbers), moves every rank's moments from its shift
to the global mean by exact algebra, and then sums the moments. With u = x - c, delta = mean - c, s = sum u:

    sum (u - delta)(v - eps)' = C - s_x eps' - delta s_y' + n delta eps'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scale_guide.statistics.matrices import Matrices, without_spread
from scale_guide.statistics.plan import Node, Pair
from scale_guide.statistics.wires import Wires


@dataclass
class _LayerMoments:
    """Sums over this rank's valid rows u = x - shift [d]: u, u u', a u and a^2 with a = |u|^2."""

    shift: Tensor
    total: Tensor
    outer: Tensor
    weighted: Tensor
    square: Tensor

    @classmethod
    def empty(cls, rows: Tensor) -> _LayerMoments:
        width = rows.shape[1]
        zeros = rows.new_zeros
        return cls(zeros(width), zeros(width), zeros(width, width), zeros(width), zeros(()))

    def add(self, u: Tensor, a: Tensor) -> None:
        self.total += u.sum(dim=0)
        self.outer.addmm_(u.T, u)
        self.weighted.addmv_(u.T, a)
        self.square += a.square().sum()

    def move(self, delta: Tensor, num_rows: int) -> None:
        """From moments of u to moments of u - delta."""
        trace, size = self.outer.diagonal().sum(), delta.square().sum()
        along, turned = self.total @ delta, self.outer @ delta
        self.square += 4 * (delta @ turned) + num_rows * size**2 - 4 * (self.weighted @ delta)
        self.square += 2 * size * trace - 4 * size * along
        self.weighted += (2 * along - trace - num_rows * size) * delta - 2 * turned + size * self.total
        self.outer.addr_(self.total, delta, alpha=-1).addr_(delta, self.total, alpha=-1)
        self.outer.addr_(delta, delta, alpha=num_rows)


@dataclass
class _PairMoments:
    """Sums over this rank's valid rows: u v', b u, a v and a b with a = |u|^2, b = |v|^2."""

    outer: Tensor
    target: Tensor
    guide: Tensor
    product: Tensor

    @classmethod
    def empty(cls, x: Tensor, y: Tensor) -> _PairMoments:
        zeros = x.new_zeros
        return cls(zeros(x.shape[1], y.shape[1]), zeros(x.shape[1]), zeros(y.shape[1]), zeros(()))

    def add(self, u: Tensor, a: Tensor, v: Tensor, b: Tensor) -> None:
        self.outer.addmm_(u.T, v)
        self.target.addmv_(u.T, b)
        self.guide.addmv_(v.T, a)
        self.product += a @ b

    def move(self, x: _LayerMoments, delta: Tensor, y: _LayerMoments, eps: Tensor, num_rows: int) -> None:
        """From moments of u, v to moments of u - delta, v - eps; x and y are the layers' moments before they moved."""
        alpha, beta = x.outer.diagonal().sum(), y.outer.diagonal().sum()
        delta2, eps2 = delta.square().sum(), eps.square().sum()
        turned, along_x, along_y = self.outer @ eps, x.total @ delta, y.total @ eps
        self.product += eps2 * alpha + delta2 * beta - 2 * (self.guide @ eps) - 2 * (self.target @ delta)
        self.product += 4 * (delta @ turned) - 2 * eps2 * along_x - 2 * delta2 * along_y + num_rows * delta2 * eps2
        self.target += eps2 * x.total - 2 * turned - (beta - 2 * along_y + num_rows * eps2) * delta
        self.outer.addr_(x.total, eps, alpha=-1).addr_(delta, y.total, alpha=-1).addr_(delta, eps, alpha=num_rows)


class CovarianceStatistics:
    """Rows of one step -> A, C, D of the listed pairs, and their gradients -> the gradient of own target rows."""

    def __init__(self, pairs: Sequence[Pair], wires: Wires, *, centre: bool) -> None:
        self._pairs, self._wires, self._centre = list(pairs), wires, centre
        self._nodes = list(dict.fromkeys(node for pair in pairs for node in pair.nodes))
        self._layers: dict[Node, _LayerMoments] = {}
        self._crosses: dict[Pair, _PairMoments] = {}
        self._means: dict[Node, Tensor] = {}
        self._num_local = 0

    def add(self, rows: Mapping[Node, Tensor], weights: Tensor, dtype: torch.dtype) -> None:
        """Adds one micro-batch to the moments: rows [b, d] by layer and their weights [b], 1 or 0. Keeps no rows."""
        if not self._nodes:
            return
        valid = None if bool(weights.all()) else weights > 0
        u, a = {}, {}
        for node in self._nodes:
            raw = (rows[node] if valid is None else rows[node][valid]).to(dtype)
            layer = self._layers.setdefault(node, _LayerMoments.empty(raw))
            if self._centre and not self._num_local and len(raw):
                layer.shift = raw.mean(dim=0)
            u[node] = raw - layer.shift
            a[node] = u[node].square().sum(dim=1)
            layer.add(u[node], a[node])
        for pair in self._pairs:
            x, y = pair.nodes
            self._crosses.setdefault(pair, _PairMoments.empty(u[x], u[y])).add(u[x], a[x], u[y], a[y])
        self._num_local += int(weights.shape[0] if valid is None else valid.sum())

    def reduce(self, matrices: Matrices) -> None:
        """Puts A, D, C, sum a^2 and sum a b into `matrices`. Collective: call on every rank.

        Two rounds: the means (d numbers a layer), then every moment about them.
        """
        if not self._nodes:
            return
        if self._centre:
            self._move_to_global_mean(matrices.num_rows)
        layers, crosses = self._layers, self._crosses
        others = [t for m in layers.values() for t in (m.weighted, m.square)]
        others += [t for m in crosses.values() for t in (m.outer, m.target, m.product)]
        self._wires.all_reduce_symmetric([m.outer for m in layers.values()], others)
        for node, moments in layers.items():
            live = self._live(node, moments, matrices.num_rows)
            matrices.features[node] = moments.outer * live
            matrices.squares[node] = moments.square * live
        for pair, cross in crosses.items():
            matrices.crosses[pair], matrices.products[pair] = cross.outer, cross.product
        self._num_rows = matrices.num_rows

    def rows_gradient(
        self, gradients: Matrices, node: Node, x: Tensor, guide: Mapping[Node, Tensor], weights: Tensor
    ) -> Tensor:
        """Returns the gradient [b, p] of this rank's raw target rows `x`: W (X (dA + dA') + sum over pairs of Y dC').

        The norms' terms are 4 d(sum a^2) a_i x_i and 2 d(sum a b) b_i x_i, less their mean over the batch.
        """
        size, valid = self._wires.size, weights[:, None] > 0
        dtype = gradients.features[node].dtype

        def prepared(rows: Tensor, of: Node) -> Tensor:
            centred = rows.to(dtype) - self._means[of] if self._centre else rows.to(dtype)
            return centred if bool(weights.all()) else centred.masked_fill_(~valid, 0)

        x = prepared(x, node)
        outer, square = gradients.features[node], gradients.squares[node]
        result = x @ (outer + outer.T)
        scale, drift = 4 * square * x.square().sum(dim=1), 4 * square * self._layers[node].weighted
        for pair in self._pairs:
            if pair.nodes[0] != node:
                continue
            y = prepared(guide[pair.nodes[1]], pair.nodes[1])
            result.addmm_(y, gradients.crosses[pair].T)
            scale += 2 * gradients.products[pair] * y.square().sum(dim=1)
            drift += 2 * gradients.products[pair] * self._crosses[pair].target
        result.addcmul_(scale[:, None], x)
        if self._centre:
            result -= valid * (drift / self._num_rows)
        return result.mul_(size)

    def _move_to_global_mean(self, num_rows: int) -> None:
        totals = [m.total + self._num_local * m.shift for m in self._layers.values()]
        self._wires.all_reduce_bucketed(totals)
        self._means = {node: total / num_rows for node, total in zip(self._layers, totals, strict=True)}
        delta = {node: self._means[node] - m.shift for node, m in self._layers.items()}
        for pair, cross in self._crosses.items():
            x, y = pair.nodes
            cross.move(self._layers[x], delta[x], self._layers[y], delta[y], self._num_local)
        for node, moments in self._layers.items():
            moments.move(delta[node], self._num_local)

    def _live(self, node: Node, moments: _LayerMoments, num_rows: int) -> Tensor:
        if not self._centre:
            return moments.outer.new_ones(())
        mean_energy = num_rows * self._means[node].square().sum()
        return (~without_spread(moments.outer.diagonal().sum(), mean_energy)).to(moments.outer.dtype)
