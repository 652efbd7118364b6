"""Gram statistics: K = X X' and L = Y Y' [n, n] of the global batch, by the layouts `gather` and `transpose`.

`gather` brings all rows to every rank. `transpose` turns batch shards into feature shards by one all-to-all, so each
rank owns some columns of all rows: centring is local, the partial Grams are summed, and the gradient goes home by the
all-to-all back. The wide activations cross the wire once, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scale_guide.statistics.matrices import Matrices, add_symmetric, exact_products, without_spread
from scale_guide.statistics.plan import Node, Pair, Side
from scale_guide.statistics.storage import Padding, Storage
from scale_guide.statistics.wires import Wires, shard_sizes

_BLOCK_COLUMNS = 8192
_CACHED_COLUMNS = 2048  # of 64 rows these stay in a core's cache


@dataclass(frozen=True)
class _Columns:
    """Some columns of all valid rows, prepared [n, c]; of padded sequences also which entries are real."""

    rows: Tensor
    real: Tensor | None


class GramStatistics:
    """Rows of one step -> K, L of the listed pairs, and dK -> the gradient of this rank's own target rows."""

    def __init__(
        self, pairs: Sequence[Pair], wires: Wires, *, transpose: bool, centre: bool, storage: Storage
    ) -> None:
        self._wires, self._centre, self._storage = wires, centre, storage
        self._transpose = transpose and wires.size > 1
        self.nodes = list(dict.fromkeys(node for pair in pairs for node in pair.nodes))
        self._stored: dict[Node, list[Tensor]] = {node: [] for node in self.nodes}
        self._weights: list[Tensor] = []
        self._masks: list[Tensor] = []
        self._padded: frozenset[Node] = frozenset()
        self._widths: dict[Node, int] = {}
        self._kept: dict[Node, _Columns] = {}
        self._home: dict[Node, list[Tensor]] = {}

    def add(self, rows: Mapping[Node, Tensor], padding: Padding | None) -> None:
        """Keeps one micro-batch's rows [b, d] of some layers."""
        for node in rows.keys() & set(self.nodes):
            self._stored[node].append(self._storage.rows(rows[node]))
        if padding is not None:
            self._padded |= padding.layers & set(self.nodes)

    def add_weights(self, weights: Tensor, padding: Padding | None) -> None:
        """Keeps one micro-batch's weights [b], 1 or 0, and which positions of its sequences are real."""
        self._weights.append(weights)
        if padding is not None:
            self._masks.append(padding.mask)

    def agree(self, num_valid: int, num_rows_per_rank: int) -> None:
        """Learns which rows of the global batch count. Collective: call on every rank.

        Args:
            num_valid: Valid rows of the global batch.
            num_rows_per_rank: The largest number of rows that any rank has; shorter ranks are padded with weight 0.
        """
        self._valid = self._real = None
        self._num_valid = num_valid
        # Else the rows may be the caller's own, which must not be centred in place.
        self._owned = self._wires.size > 1 or len(self._weights) > 1
        self._lacking = num_rows_per_rank - sum(len(w) for w in self._weights)
        if not self.nodes or (num_valid == num_rows_per_rank * self._wires.size and not self._masks):
            return
        own = torch.cat(
            [(torch.cat(self._weights) > 0)[:, None], *([torch.cat(self._masks)] if self._padded else [])], 1
        )
        own = torch.nn.functional.pad(own.to(torch.uint8), (0, 0, 0, self._lacking))
        everyone: list[Tensor] = []
        self._wires.all_rows([own], lambda _, rows: everyone.append(rows > 0))
        self._valid = everyone[0][:, 0]
        self._real = everyone[0][self._valid, 1:] if self._masks else None

    def reduce(self, sides: Collection[Side], matrices: Matrices, dtype: torch.dtype) -> None:
        """Puts K (side target) or L (side guide), or both, into `matrices.grams`. Collective: call on every rank.

        The guide's rows are dropped as they are used, the target's are kept as `send_back` needs them.
        """
        nodes = [node for node in self.nodes if node[0] in sides]
        energies: dict[Node, Tensor] = {}

        def use(i: int, rows: Tensor) -> None:
            make = self._target_gram if nodes[i][0] == "target" else self._guide_gram
            matrices.grams[nodes[i]], energies[nodes[i]] = make(nodes[i], rows, dtype)

        bring = self._wires.to_features if self._transpose else self._wires.all_rows
        bring([self._local_rows(node) for node in nodes], use, self._weights[0].device)
        if self._transpose:
            grams, others = [matrices.grams[node] for node in nodes], [energies[node] for node in nodes]
            self._wires.all_reduce_symmetric(grams, others)
        for node in nodes:
            gram = matrices.grams[node]
            gram.mul_(~without_spread(gram.diagonal().sum(), energies[node]))

    def send_back(self, gradients: Matrices) -> None:
        """Turns dK into the gradient of this rank's own rows, dX = H (dK + dK') H X. Collective: call on every rank.

        The factor W makes it the gradient after the engine's mean over ranks.
        """
        targets = list(self._kept)
        homes = []
        for node in targets:
            mixing = gradients.grams[node] + gradients.grams[node].T
            if self._centre and node not in self._padded:
                mixing -= mixing.mean(dim=0)
            mixing *= self._wires.size
            homes.append(self._pull_back(node, mixing, self._kept.pop(node)))
        if self._transpose:
            homes = self._wires.to_rows(homes, [self._widths[node] for node in targets])
        sizes = [len(w) for w in self._weights]
        for node in targets:
            home = homes.pop(0)[: sum(sizes)]
            self._home[node] = [self._storage.gradient(part) for part in torch.split(home, sizes)]

    def rows_gradient(self, micro_batch: int, node: Node) -> Tensor:
        """Returns the gradient [b, p] of the target layer `node` for one micro-batch, in the order added."""
        return self._home[node][micro_batch]

    def _local_rows(self, node: Node) -> Tensor:
        stored = self._stored[node]
        rows = stored[0] if len(stored) == 1 else torch.cat(stored)
        stored.clear()
        self._widths[node] = rows.shape[1]
        return rows if not self._lacking else torch.nn.functional.pad(rows, (0, 0, 0, self._lacking))

    def _columns(self, node: Node, rows: Tensor, first: int, dtype: torch.dtype) -> tuple[_Columns, Tensor]:
        """Returns the valid rows of columns `first`, `first` + 1, ..., prepared, and n |mean|^2 of the removed."""
        values = (rows if self._valid is None else rows[self._valid]).to(dtype)
        real = self._real_entries(node, first, rows.shape[1]) if node in self._padded else None
        if not self._centre:
            return _Columns(values, real), values.new_zeros(())
        values, energy = _centred(values, real, in_place=values is not rows or self._owned)
        return _Columns(values, real), energy

    def _real_entries(self, node: Node, first: int, num_columns: int) -> Tensor:
        assert self._real is not None, "a padded layer has a mask"
        position = torch.arange(first, first + num_columns, device=self._real.device)
        return self._real[:, position // (self._widths[node] // self._real.shape[1])]

    def _target_gram(self, node: Node, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        self._kept[node], energy = self._columns(node, rows, self._first_column(node), dtype)
        gram = rows.new_zeros(self._num_valid, self._num_valid, dtype=dtype)
        return add_symmetric(gram, self._kept[node].rows), energy

    def _guide_gram(self, node: Node, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As for a target, but block by block and keeping nothing: fp16 rows never exist whole in fp32."""
        gram = rows.new_zeros(self._num_valid, self._num_valid, dtype=dtype)
        energy = rows.new_zeros((), dtype=dtype)
        first = self._first_column(node)
        for start in range(0, rows.shape[1], _BLOCK_COLUMNS):
            block, removed = self._columns(node, rows[:, start : start + _BLOCK_COLUMNS], first + start, dtype)
            add_symmetric(gram, block.rows)
            energy += removed
        return gram, energy

    def _first_column(self, node: Node) -> int:
        sizes = shard_sizes(self._widths[node], self._wires.size) if self._transpose else [0]
        return sum(sizes[: self._wires.rank])

    def _pull_back(self, node: Node, mixing: Tensor, kept: _Columns) -> Tensor:
        """Returns mixing @ rows: of all rows and own columns (transpose), or of own rows and all columns (gather).

        A padded layer is centred over its real entries alone, and so is its gradient, column by column.
        """
        valid, padded = self._valid, self._centre and kept.real is not None
        if self._transpose:
            product = mixing @ kept.rows
            if padded:
                product, _ = _centred(product, kept.real, in_place=True)
            return _spread(product, valid)
        num_rows = (len(kept.rows) if valid is None else len(valid)) // self._wires.size
        own = slice(self._wires.rank * num_rows, (self._wires.rank + 1) * num_rows)
        if valid is None:
            return mixing[own] @ kept.rows
        first = int(valid[: own.start].sum())
        rows = slice(first, first + int(valid[own].sum()))
        product = mixing[rows] @ kept.rows
        if padded and kept.real is not None:
            product.sub_(self._masked_column_means(mixing, kept)).mul_(kept.real[rows])
        return _spread(product, valid[own])

    def _masked_column_means(self, mixing: Tensor, kept: _Columns) -> Tensor:
        """Returns the column means of mixing @ rows over real entries, without the product of other ranks' rows."""
        assert self._real is not None, "a padded layer has a mask"
        real = self._real.to(mixing.dtype)
        rows = kept.rows.view(len(kept.rows), real.shape[1], -1)
        sums = torch.einsum("tn,nth->th", real.T @ mixing, rows)
        return (sums / real.sum(dim=0).clamp_min(1)[:, None]).flatten()


@torch.no_grad()
def gram_of(rows: Tensor, mask: Tensor | None = None, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns the Gram matrix [n, n] of one process's rows [n, d] less their column means; zero if they do not spread.

    Block by block, so that rows of another number format never exist whole in this one.

    Args:
        rows: Of any floating dtype.
        mask: Of flattened sequences: True for real positions [n, T], d being T * width. Padding has its column's mean.
        dtype: What is multiplied and added in.
    """
    num_rows, width = rows.shape
    gram, energy = rows.new_zeros(num_rows, num_rows, dtype=dtype), rows.new_zeros((), dtype=dtype)
    with exact_products(rows.device):
        for start in range(0, width, _CACHED_COLUMNS):
            block = rows[:, start : start + _CACHED_COLUMNS].to(dtype)
            real = None
            if mask is not None:
                position = torch.arange(start, start + block.shape[1], device=rows.device) // (width // mask.shape[1])
                real = mask.to(rows.device)[:, position]
            centred, removed = _centred(block, real, in_place=rows.dtype != dtype)
            add_symmetric(gram, centred)
            energy += removed
    # What the rows themselves were rounded to, however exact the sums are.
    precision = torch.promote_types(rows.dtype, torch.float32)
    return gram.mul_(~without_spread(gram.diagonal().sum().to(precision), energy.to(precision)))


def _centred(values: Tensor, real: Tensor | None, *, in_place: bool) -> tuple[Tensor, Tensor]:
    """Returns values [n, c] less their column means, and n |mean|^2.

    Of padded sequences the mean is that of the real entries, and the others become zero, as if they had it.
    """
    if real is None:
        mean = values.mean(dim=0)
        return values.sub_(mean) if in_place else values - mean, mean.square().sum() * len(values)
    counts = real.sum(dim=0).clamp_min(1)
    values = values.mul_(real) if in_place else values * real
    mean = values.sum(dim=0) / counts
    return values.sub_(mean).mul_(real), (mean.square() * counts).sum()


def _spread(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Returns valid rows [n, p] at their places among all rows [N, p]; the others are zero."""
    if valid is None:
        return rows
    everywhere = rows.new_zeros(len(valid), rows.shape[1])
    everywhere[valid] = rows
    return everywhere
