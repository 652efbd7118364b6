"""One optimizer step's statistics: rows scattered over ranks and micro-batches -> matrices on every rank, and back."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from scale_guide.statistics.covariance import CovarianceStatistics
from scale_guide.statistics.gram import GramStatistics
from scale_guide.statistics.matrices import Matrices, exact_products
from scale_guide.statistics.plan import Node, Plan
from scale_guide.statistics.wires import Wires

Rows = Mapping[str, Tensor]
MIN_ROWS = 4
"""Fewest rows of a global batch: the unbiased estimate of HSIC divides by n - 3."""


class Statistics:
    """The statistics of one optimizer step, by the layouts of a plan.

    Use: `add` once per micro-batch, `reduce` once, `send_back` once, `rows_gradient` per micro-batch and layer.

    Args:
        plan: Which layout computes which pairs.
        wires: The ranks that share the batch.
        centre: Whether the similarity wants rows centred over the global batch.
        norms: Whether `covariance` also gives the sums of squared row norms, for unbiased estimators.
    """

    def __init__(self, plan: Plan, wires: Wires, *, centre: bool = True, norms: bool = True) -> None:
        self._plan, self._wires = plan, wires
        self._gather = GramStatistics(plan.pairs("gather"), wires, transpose=False, centre=centre)
        self._transpose = GramStatistics(plan.pairs("transpose"), wires, transpose=True, centre=centre)
        self._covariance = CovarianceStatistics(plan.pairs("covariance"), wires, centre=centre, norms=norms)
        self._in_covariance = {node for pair in plan.pairs("covariance") for node in pair.nodes}
        self._num_rows = self._num_valid = 0
        self._shapes = zlib.crc32(str([(part.layout, *map(str, part.pairs)) for part in plan.parts]).encode())
        self._dtype = torch.float32
        self._device = torch.device("cpu")

    @torch.no_grad()
    def add(self, target: Rows, guide: Rows, weights: Tensor | None = None) -> None:
        """Adds one micro-batch, without gradient.

        Args:
            target: Target layer -> rows [b, p].
            guide: Guide layer -> rows [b, q], in their own (fp16) dtype.
            weights: 1 or 0 for each row [b]; a row of weight 0 counts as never there. None: all count.

        Raises:
            ValueError: target and guide layers with different numbers of rows.
        """
        rows = _by_node(target, guide)
        first = next(iter(rows.values()))
        _check_equal_rows(rows)
        weights = first.new_ones(first.shape[0]) if weights is None else weights.to(first.device)
        if any(r.dtype == torch.float64 for r in rows.values()):
            self._dtype = torch.float64
        shapes = ";".join(f"{node}:{value.shape[1]}:{value.dtype}" for node, value in sorted(rows.items()))
        self._shapes = zlib.crc32(shapes.encode(), self._shapes)
        self._num_rows += first.shape[0]
        self._num_valid += int((weights > 0).sum())
        self._device = first.device
        with exact_products(self._device):
            self._gather.add(rows, weights)
            self._transpose.add(rows, weights)
            self._covariance.add(rows, weights, self._dtype)

    @torch.no_grad()
    def reduce(self) -> Matrices:
        """Returns the matrices of the global batch: every forward collective of the step.

        Collective: call on every rank.

        Raises:
            ValueError: fewer than 4 valid rows in all, or ranks that collected different layers or widths (on every
                rank alike).
        """
        matrices = Matrices(num_rows=0)
        most_rows, matrices.num_rows = self._agree()
        with exact_products(self._device):
            self._gather.reduce(matrices, most_rows, self._dtype)
            self._transpose.reduce(matrices, most_rows, self._dtype)
            self._covariance.reduce(matrices)
        return matrices

    @torch.no_grad()
    def send_back(self, gradients: Matrices) -> None:
        """Takes d(loss) / d(matrices) and brings each rank what its own rows need. Collective: call on every rank."""
        self._gradients = gradients
        with exact_products(self._device):
            self._gather.send_back(gradients)
            self._transpose.send_back(gradients)

    @torch.no_grad()
    def rows_gradient(
        self, micro_batch: int, layer: str, x: Tensor, guide: Rows, weights: Tensor | None = None
    ) -> Tensor:
        """Returns the gradient [b, p] for this rank's own rows of a target layer, in the matrices' dtype. Local.

        It follows the data-parallel convention: after the engine's mean over W ranks it is the gradient of the global
        loss. It stays in fp32 (or fp64), for fp16 would flush it to zero.

        Args:
            micro_batch: Index in the order added.
            layer: The target layer.
            x: Its raw rows [b, p] of that micro-batch; read by `covariance` only.
            guide: Guide layer -> rows [b, q] of that micro-batch; read by `covariance` only.
            weights: As given to `add`.
        """
        node: Node = ("target", layer)
        if node not in self._in_covariance:
            gram = self._transpose if node in self._transpose.nodes else self._gather
            return gram.rows_gradient(micro_batch, node)
        weights = x.new_ones(x.shape[0]) if weights is None else weights.to(x.device)
        rows = _by_node({}, guide)
        with exact_products(self._device):
            return self._covariance.rows_gradient(self._gradients, node, x, rows, weights)

    def _agree(self) -> tuple[int, int]:
        """Returns the most rows of any rank and the valid rows of all; ranks that disagree raise on all alike."""
        everyone = self._wires.exchange([self._num_rows, self._num_valid, self._shapes], self._device)
        num_rows, num_valid, shapes = (list(column) for column in zip(*everyone, strict=True))
        if len(set(shapes)) > 1:
            raise ValueError(
                "The ranks collected different layers, widths, number formats or layouts, so their statistics cannot "
                "be added. Every rank must build the same models, cut or pad its inputs to the same shape "
                "(max_length), and have about as many rows, or name a layout other than auto."
            )
        if sum(num_valid) < MIN_ROWS:
            raise ValueError(
                f"The global batch has {sum(num_valid)} valid rows, but a similarity needs at least {MIN_ROWS} to "
                "mean anything. Use a larger training.batch_size, or rows: token."
            )
        return max(num_rows), sum(num_valid)


def _by_node(target: Rows, guide: Rows) -> dict[Node, Tensor]:
    rows: dict[Node, Tensor] = {("target", name): value.detach() for name, value in target.items()}
    rows.update({("guide", name): value.detach() for name, value in guide.items()})
    return rows


def _check_equal_rows(rows: Mapping[Node, Tensor]) -> None:
    (first_side, first), count = next((node, value.shape[0]) for node, value in rows.items())
    for (side, name), value in rows.items():
        if value.shape[0] != count:
            raise ValueError(
                f"The {first_side} layer {first!r} has {count} rows but the {side} layer {name!r} has "
                f"{value.shape[0]}: a similarity compares the same rows. Feed both networks the same batch, and "
                "choose rows (flatten | token | mean | last) so that one row means the same in both."
            )
