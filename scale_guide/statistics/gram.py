"""Gram statistics: K = X X' and L = Y Y' [n, n] of the global batch, by the layouts `gather` and `transpose`.

`gather` brings all rows to every rank. `transpose` turns batch shards into feature shards by one all-to-all, so each
rank owns some columns of all rows: centring is local, the partial Grams are summed, and the gradient goes home by the
all-to-all back. The wide activations cross the wire once, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scale_guide.statistics.matrices import Matrices, add_symmetric, without_spread
from scale_guide.statistics.plan import Node, Pair
from scale_guide.statistics.wires import Wires

_BLOCK_COLUMNS = 8192


class GramStatistics:
    """Rows of one step -> K, L of the listed pairs, and dK -> the gradient of this rank's own target rows."""

    def __init__(self, pairs: Sequence[Pair], wires: Wires, *, transpose: bool, centre: bool) -> None:
        self._wires, self._centre = wires, centre
        self._transpose = transpose and wires.size > 1
        nodes = list(dict.fromkeys(node for pair in pairs for node in pair.nodes))
        self.nodes = frozenset(nodes)
        self._targets = [node for node in nodes if node[0] == "target"]
        self._guides = [node for node in nodes if node[0] == "guide"]
        self._stored: dict[Node, list[Tensor]] = {node: [] for node in nodes}
        self._weights: list[Tensor] = []
        self._widths: dict[Node, int] = {}
        self._kept: dict[Node, Tensor] = {}
        self._home: dict[Node, tuple[Tensor, ...]] = {}

    def add(self, rows: dict[Node, Tensor], weights: Tensor) -> None:
        """Keeps one micro-batch: rows [b, d] by layer and their weights [b], 1 or 0."""
        for node, stored in self._stored.items():
            stored.append(rows[node])
        self._weights.append(weights)

    def reduce(self, matrices: Matrices, num_rows_per_rank: int, dtype: torch.dtype) -> None:
        """Puts K and L into `matrices.grams`. Collective: call on every rank.

        Args:
            matrices: Where the result goes; `num_rows` says how many rows of the global batch are valid.
            num_rows_per_rank: The largest number of rows that any rank has; shorter ranks are padded with weight 0.
            dtype: Of the matrices.
        """
        if not self._stored:
            return
        self._padding = num_rows_per_rank - sum(w.shape[0] for w in self._weights)
        self._num_valid = matrices.num_rows
        self._valid = self._gather_valid(num_rows_per_rank)
        means: dict[Node, Tensor] = {}

        def use_guide(i: int, rows: Tensor) -> None:
            node = self._guides[i]
            matrices.grams[node], means[node] = self._guide_gram(rows, dtype)

        def use_target(i: int, rows: Tensor) -> None:
            node = self._targets[i]
            matrices.grams[node], means[node] = self._target_gram(node, rows, dtype)

        bring = self._wires.to_features if self._transpose else self._wires.all_rows
        bring([self._local_rows(node) for node in self._guides], use_guide)
        bring([self._local_rows(node) for node in self._targets], use_target)
        if self._transpose:
            self._wires.all_reduce_symmetric([matrices.grams[node] for node in means], list(means.values()))
        for node, mean_energy in means.items():
            gram = matrices.grams[node]
            gram.mul_(~without_spread(gram.diagonal().sum(), mean_energy))

    def send_back(self, gradients: Matrices) -> None:
        """Turns dK into the gradient of this rank's own rows, dX = H (dK + dK') H X. Collective: call on every rank.

        The factor W makes it the gradient after the engine's mean over ranks.
        """
        products = {}
        for node in self._targets:
            mixing = gradients.grams[node] + gradients.grams[node].T
            if self._centre:
                mixing -= mixing.mean(dim=0)
            mixing *= self._wires.size
            products[node] = self._pull_back(mixing, self._kept.pop(node))
        homes: Sequence[Tensor] = list(products.values())
        if self._transpose:
            homes = self._wires.to_rows(homes, [self._widths[node] for node in products])
        sizes = [w.shape[0] for w in self._weights]
        for node, home in zip(products, homes, strict=True):
            self._home[node] = torch.split(home[: sum(sizes)], sizes)

    def rows_gradient(self, micro_batch: int, node: Node) -> Tensor:
        """Returns the gradient [b, p] of the target layer `node` for one micro-batch, in the order added."""
        return self._home[node][micro_batch]

    def _local_rows(self, node: Node) -> Tensor:
        stored = self._stored[node]
        rows = stored[0] if len(stored) == 1 else torch.cat(stored)
        stored.clear()
        self._widths[node] = rows.shape[1]
        return rows if not self._padding else torch.nn.functional.pad(rows, (0, 0, 0, self._padding))

    def _gather_valid(self, num_rows_per_rank: int) -> Tensor | None:
        """Returns which rows of the global batch are valid [N], rank by rank; None when all are."""
        if self._num_valid == num_rows_per_rank * self._wires.size:
            return None
        own = torch.nn.functional.pad(torch.cat(self._weights), (0, self._padding))
        everyone: list[Tensor] = []
        self._wires.all_rows([own[:, None].float()], lambda _, rows: everyone.append(rows))
        return everyone[0][:, 0] > 0

    def _select(self, rows: Tensor) -> Tensor:
        return rows if self._valid is None else rows[self._valid]

    def _prepare(self, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns valid rows in `dtype`, centred if the similarity asks for it, and n |mean|^2 of what was removed."""
        selected = self._select(rows).to(dtype)
        if not self._centre:
            return selected, selected.new_zeros(())
        mean = selected.mean(dim=0)
        ours = selected is not rows or self._wires.size > 1
        centred = selected.sub_(mean) if ours else selected - mean
        return centred, mean.square().sum() * selected.shape[0]

    def _target_gram(self, node: Node, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        self._kept[node], mean_energy = self._prepare(rows, dtype)
        gram = rows.new_zeros(self._num_valid, self._num_valid, dtype=dtype)
        return add_symmetric(gram, self._kept[node]), mean_energy

    def _guide_gram(self, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As for a target, but block by block and keeping nothing: fp16 rows never exist whole in fp32."""
        gram = rows.new_zeros(self._num_valid, self._num_valid, dtype=dtype)
        energy = rows.new_zeros((), dtype=dtype)
        for block in torch.split(rows, _BLOCK_COLUMNS, dim=1):
            prepared, mean_energy = self._prepare(block, dtype)
            add_symmetric(gram, prepared)
            energy += mean_energy
        return gram, energy

    def _pull_back(self, mixing: Tensor, rows: Tensor) -> Tensor:
        """Returns mixing @ rows: of all rows and own columns (transpose), or of own rows and all columns (gather)."""
        valid = self._valid
        if self._transpose:
            return _spread(mixing @ rows, valid)
        num_rows = len(rows if valid is None else valid) // self._wires.size
        own = slice(self._wires.rank * num_rows, (self._wires.rank + 1) * num_rows)
        if valid is None:
            return mixing[own] @ rows
        first = int(valid[: own.start].sum())
        return _spread(mixing[first : first + int(valid[own].sum())] @ rows, valid[own])


def _spread(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Returns valid rows [n, p] at their places among all rows [N, p]; the others are zero."""
    if valid is None:
        return rows
    everywhere = rows.new_zeros(len(valid), rows.shape[1])
    everywhere[valid] = rows
    return everywhere
