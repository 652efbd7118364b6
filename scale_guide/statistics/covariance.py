"""Feature statistics: A = X'X, C = X'Y, D = Y'Y of the centred global batch, with memory free of the number of rows.

Each rank sums moments about a shift of its own (the mean of its first micro-batch), so nothing cancels however far
from zero the rows lie. `reduce` moves them to the rank's own mean by exact algebra, and sums them over ranks together
with every rank's count and mean; what then lies between the ranks is added locally. With u = x - c, s = sum u:

    sum (u - delta)(v - eps)' = sum u v' - s_x eps' - delta s_y' + n delta eps'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scale_guide.statistics.matrices import Matrices, add_symmetric, without_spread
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

    def add(self, u: Tensor, a: Tensor | None) -> None:
        """Adds rows u [b, d] and their squared norms a [b]; without norms `weighted` and `square` stay zero."""
        self.total += u.sum(dim=0)
        add_symmetric(self.outer, u.T)
        if a is not None:
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
        self.total -= num_rows * delta


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

    def add(self, u: Tensor, a: Tensor | None, v: Tensor, b: Tensor | None) -> None:
        """Adds rows u [n, p], v [n, q] and their squared norms a, b [n]; without norms only `outer` grows."""
        self.outer.addmm_(u.T, v)
        if a is not None and b is not None:
            self.target.addmv_(u.T, b)
            self.guide.addmv_(v.T, a)
            self.product += a @ b

    def move(self, x: _LayerMoments, delta: Tensor, y: _LayerMoments, eps: Tensor, num_rows: int) -> None:
        """From moments of u, v to moments of u - delta, v - eps; x and y are the layers' moments before they moved."""
        alpha, beta = x.outer.diagonal().sum(), y.outer.diagonal().sum()
        delta2, eps2 = delta.square().sum(), eps.square().sum()
        turned, along_x, along_y = self.outer @ eps, x.total @ delta, y.total @ eps
        back = self.outer.T @ delta
        self.product += eps2 * alpha + delta2 * beta - 2 * (self.guide @ eps) - 2 * (self.target @ delta)
        self.product += 4 * (delta @ turned) - 2 * eps2 * along_x - 2 * delta2 * along_y + num_rows * delta2 * eps2
        self.target += eps2 * x.total - 2 * turned - (beta - 2 * along_y + num_rows * eps2) * delta
        self.guide += delta2 * y.total - 2 * back - (alpha - 2 * along_x + num_rows * delta2) * eps
        self.outer.addr_(x.total, eps, alpha=-1).addr_(delta, y.total, alpha=-1).addr_(delta, eps, alpha=num_rows)


class CovarianceStatistics:
    """Rows of one step -> A, C, D of the listed pairs, and their gradients -> the gradient of own target rows."""

    def __init__(self, pairs: Sequence[Pair], wires: Wires, *, centre: bool, norms: bool) -> None:
        self._pairs, self._wires, self._centre, self._norms = list(pairs), wires, centre, norms
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
        u: dict[Node, Tensor] = {}
        a: dict[Node, Tensor | None] = {}
        for node in self._nodes:
            raw = (rows[node] if valid is None else rows[node][valid]).to(dtype)
            layer = self._layers.setdefault(node, _LayerMoments.empty(raw))
            if self._centre and not self._num_local and len(raw):
                layer.shift = raw.mean(dim=0)
            u[node] = raw - layer.shift
            a[node] = u[node].square().sum(dim=1) if self._norms else None
            layer.add(u[node], a[node])
        for pair in self._pairs:
            x, y = pair.nodes
            self._crosses.setdefault(pair, _PairMoments.empty(u[x], u[y])).add(u[x], a[x], u[y], a[y])
        self._num_local += int(weights.shape[0] if valid is None else valid.sum())

    def reduce(self, matrices: Matrices) -> None:
        """Puts A, D, C and, if asked for, sum a^2 and sum a b into `matrices`. Collective: call on every rank.

        One bucketed all-reduce; the norms need the global mean first and take a second, small one.
        """
        if not self._nodes:
            return
        self._num_rows = matrices.num_rows
        own = self._move_to_own_mean()
        # The norms still need this rank's own second moments when the sum is there.
        keep = self._norms and self._wires.size > 1
        for node, layer in self._layers.items():
            matrices.features[node] = layer.outer.clone() if keep else layer.outer
        for pair, cross in self._crosses.items():
            matrices.crosses[pair] = cross.outer.clone() if keep else cross.outer
        slots = self._slots(own)
        self._wires.all_reduce_symmetric(list(matrices.features.values()), [*matrices.crosses.values(), slots])
        if self._centre:
            self._add_between_ranks(matrices, slots)
        if self._norms:
            self._reduce_norms(matrices, own)
        self._flatten_dead_layers(matrices)
        # The largest parts, not read again.
        for layer in self._layers.values():
            layer.outer = layer.outer.new_empty(0)
        for cross in self._crosses.values():
            cross.outer = cross.outer.new_empty(0)

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

        x, outer = prepared(x, node), gradients.features[node]
        result = x @ (outer + outer.T)
        rows = {pair: prepared(guide[pair.nodes[1]], pair.nodes[1]) for pair in self._pairs if pair.nodes[0] == node}
        for pair, y in rows.items():
            result.addmm_(y, gradients.crosses[pair].T)
        if node in gradients.squares:
            self._add_norms(result, gradients, node, x, rows, valid)
        return result.mul_(size)

    def _add_norms(
        self, result: Tensor, gradients: Matrices, node: Node, x: Tensor, rows: Mapping[Pair, Tensor], valid: Tensor
    ) -> None:
        square = gradients.squares[node]
        scale, drift = 4 * square * x.square().sum(dim=1), 4 * square * self._layers[node].weighted
        for pair, y in rows.items():
            scale += 2 * gradients.products[pair] * y.square().sum(dim=1)
            drift += 2 * gradients.products[pair] * self._crosses[pair].target
        result.addcmul_(scale[:, None], x)
        if self._centre:
            result -= valid * (drift / self._num_rows)

    def _move_to_own_mean(self) -> dict[Node, Tensor]:
        """Moves this rank's moments from its shift to the mean of its own rows; returns that mean, or zeros."""
        if not (self._centre and self._num_local):
            return {node: layer.shift for node, layer in self._layers.items()}
        step = {node: layer.total / self._num_local for node, layer in self._layers.items()}
        self._move(step)
        return {node: layer.shift + step[node] for node, layer in self._layers.items()}

    def _move(self, delta: Mapping[Node, Tensor]) -> None:
        for pair, cross in self._crosses.items():
            x, y = pair.nodes
            cross.move(self._layers[x], delta[x], self._layers[y], delta[y], self._num_local)
        for node, layer in self._layers.items():
            layer.move(delta[node], self._num_local)

    def _slots(self, own: Mapping[Node, Tensor]) -> Tensor:
        """Returns zeros [W, 1 + d] with this rank's count and means in its own row: summed, everyone's."""
        means = torch.cat(list(own.values()))
        slots = means.new_zeros(self._wires.size, 1 + len(means))
        slots[self._wires.rank, 0] = self._num_local
        slots[self._wires.rank, 1:] = means
        return slots

    def _add_between_ranks(self, matrices: Matrices, slots: Tensor) -> None:
        """Adds sum over ranks of n_r (m_r - m)(m_r - m)', what the ranks' own centred moments lack."""
        counts, means = slots[:, 0], slots[:, 1:]
        mean = counts @ means / self._num_rows
        widths = [len(layer.total) for layer in self._layers.values()]
        self._means = dict(zip(self._layers, torch.split(mean, widths), strict=True))
        apart = torch.split(counts.sqrt()[:, None] * (means - mean), widths, dim=1)
        between = dict(zip(self._layers, apart, strict=True))
        for node, outer in matrices.features.items():
            outer.addmm_(between[node].T, between[node])
        for pair, outer in matrices.crosses.items():
            x, y = pair.nodes
            outer.addmm_(between[x].T, between[y])

    def _reduce_norms(self, matrices: Matrices, own: Mapping[Node, Tensor]) -> None:
        if self._centre:
            self._move({node: self._means[node] - mean for node, mean in own.items()})
        layers, crosses = self._layers.values(), self._crosses.values()
        tensors = [t for layer in layers for t in (layer.weighted, layer.square)]
        self._wires.all_reduce_bucketed(tensors + [t for cross in crosses for t in (cross.target, cross.product)])
        matrices.squares.update({node: layer.square for node, layer in self._layers.items()})
        matrices.products.update({pair: cross.product for pair, cross in self._crosses.items()})

    def _flatten_dead_layers(self, matrices: Matrices) -> None:
        for node, mean in self._means.items():
            outer = matrices.features[node]
            live = ~without_spread(outer.diagonal().sum(), self._num_rows * mean.square().sum())
            outer.mul_(live)
            if self._norms:
                matrices.squares[node].mul_(live)
