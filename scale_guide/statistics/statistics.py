"""One optimizer step's statistics: rows scattered over ranks and micro-batches -> matrices on every rank, and back."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from scale_guide.statistics.covariance import CovarianceStatistics
from scale_guide.statistics.gram import GramStatistics
from scale_guide.statistics.matrices import Matrices, exact_products
from scale_guide.statistics.plan import Layout, Node, Plan, Side
from scale_guide.statistics.storage import Padding, Storage
from scale_guide.statistics.wires import Wires

Rows = Mapping[str, Tensor]
_GRAM_LAYOUTS: tuple[tuple[Layout, bool], ...] = (("gather", False), ("transpose", True))
_GUIDE: tuple[Side, ...] = ("guide",)
_TARGET: tuple[Side, ...] = ("target",)
MIN_ROWS = 4
"""Fewest rows of a global batch: the unbiased estimate of HSIC divides by n - 3."""


class Statistics:
    """The statistics of one optimizer step, by the layouts of a plan.

    Use: `add` once per micro-batch, `reduce` once, `send_back` once, `rows_gradient` per micro-batch and layer. With a
    single micro-batch, `add_guide` and `reduce_guide` before the target runs and `add_target` after it, in place of
    `add`: then no guide rows lie about while the target makes its own.

    Args:
        plan: Which layout computes which pairs.
        wires: The ranks that share the batch.
        centre: Whether the similarity wants rows centred over the global batch.
        norms: Whether `covariance` also gives the sums of squared row norms, for unbiased estimators.
        storage: How the Gram layouts keep rows until `reduce`, and gradients after `send_back`.
    """

    def __init__(
        self,
        plan: Plan,
        wires: Wires,
        *,
        centre: bool = True,
        norms: bool = True,
        storage: Storage = Storage(),  # noqa: B008 - frozen
    ) -> None:
        self._plan, self._wires = plan, wires
        self._grams = [
            GramStatistics(plan.pairs(layout), wires, transpose=transpose, centre=centre, storage=storage)
            for layout, transpose in _GRAM_LAYOUTS
        ]
        self._covariance = CovarianceStatistics(plan.pairs("covariance"), wires, centre=centre, norms=norms)
        self._in_covariance = {node for pair in plan.pairs("covariance") for node in pair.nodes}
        self._num_rows = self._num_valid = self._num_micro_batches = 0
        self._shapes = zlib.crc32(str([(part.layout, *map(str, part.pairs)) for part in plan.parts]).encode())
        self._matrices: Matrices | None = None
        self._reduced_guide = False
        self._dtype = torch.float32
        self._device = torch.device("cpu")

    def add(self, target: Rows, guide: Rows, weights: Tensor | None = None, *, padding: Padding | None = None) -> None:
        """Adds one micro-batch, without gradient.

        Args:
            target: Target layer -> rows [b, p].
            guide: Guide layer -> rows [b, q], in their own (fp16) dtype.
            weights: 1 or 0 for each row [b]; a row of weight 0 counts as never there. None: all count.
            padding: Which positions of flattened sequences are real; None: all.

        Raises:
            ValueError: layers with different numbers of rows, or padding in a layer that `covariance` computes.
        """
        self.add_guide(guide, weights, padding=padding)
        self.add_target(target, guide, weights, padding=padding)

    @torch.no_grad()
    def add_guide(self, guide: Rows, weights: Tensor | None = None, *, padding: Padding | None = None) -> None:
        """Adds the guide's half of one micro-batch; arguments and errors as of `add`."""
        rows = _by_node("guide", guide)
        self._see(rows, padding)
        weights = _weights(rows, weights)
        for gram in self._grams:
            gram.add(rows, padding)
            gram.add_weights(weights, padding)
        self._num_micro_batches += 1
        self._num_rows += len(weights)
        self._num_valid += int((weights > 0).sum())

    @torch.no_grad()
    def add_target(
        self, target: Rows, guide: Rows, weights: Tensor | None = None, *, padding: Padding | None = None
    ) -> None:
        """Adds the target's half of the micro-batch that `add_guide` began; arguments and errors as of `add`.

        Of the guide's rows only those in `covariance` pairs are read.
        """
        rows = _by_node("target", target)
        self._see(rows, padding)
        both = rows | _by_node("guide", guide)
        _check_equal_rows(both)
        with exact_products(self._device):
            for gram in self._grams:
                gram.add(rows, padding)
            self._covariance.add(both, _weights(rows, weights), self._dtype)

    @torch.no_grad()
    def reduce_guide(self) -> None:
        """Brings the guide's Gram matrices to every rank and drops its rows. Collective: call on every rank.

        Raises:
            ValueError: as `reduce`.
        """
        matrices = self._agreed_matrices()
        with exact_products(self._device):
            for gram in self._grams:
                gram.reduce(_GUIDE, matrices, self._dtype)
        self._reduced_guide = True

    @torch.no_grad()
    def reduce(self) -> Matrices:
        """Returns the matrices of the global batch: every forward collective of the step, but for `reduce_guide`'s.

        Collective: call on every rank.

        Raises:
            ValueError: fewer than 4 valid rows in all, or ranks that collected different layers or widths (on every
                rank alike).
        """
        if not self._reduced_guide and self._num_micro_batches > 1:
            self.reduce_guide()  # first, for the rows of both sides on the way at once would be the peak of the step
        matrices = self._agreed_matrices()
        sides = _TARGET if self._reduced_guide else _GUIDE + _TARGET
        with exact_products(self._device):
            for gram in self._grams:
                gram.reduce(sides, matrices, self._dtype)
            self._covariance.reduce(matrices)
        return matrices

    @torch.no_grad()
    def send_back(self, gradients: Matrices) -> None:
        """Takes d(loss) / d(matrices) and brings each rank what its own rows need. Collective: call on every rank."""
        self._gradients = gradients
        with exact_products(self._device):
            for gram in self._grams:
                gram.send_back(gradients)

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
            gram = next(gram for gram in self._grams if node in gram.nodes)
            return gram.rows_gradient(micro_batch, node).to(x.device)
        rows = _by_node("guide", guide)
        with exact_products(self._device):
            return self._covariance.rows_gradient(self._gradients, node, x, rows, _weights({node: x}, weights))

    def _see(self, rows: Mapping[Node, Tensor], padding: Padding | None) -> None:
        """Takes note of what every rank must have alike."""
        _check_equal_rows(rows)
        self._device = next(iter(rows.values())).device
        if any(value.dtype == torch.float64 for value in rows.values()):
            self._dtype = torch.float64
        shapes = ";".join(f"{node}:{value.shape[1]}:{value.dtype}" for node, value in sorted(rows.items()))
        length = 0 if padding is None else padding.mask.shape[1]
        self._shapes = zlib.crc32(f"{shapes};{length}".encode(), self._shapes)
        padded = self._in_covariance & (padding.layers if padding is not None else set())
        if padded:
            raise ValueError(
                f"guidance.layout='covariance' cannot leave out the padding of flattened sequences, but the layer "
                f"{min(padded)[1]!r} has some. Use layout auto, gather or transpose, or rows token, mean or last."
            )

    def _agreed_matrices(self) -> Matrices:
        """Returns the step's matrices, once it is known which rows count. Collective on the first call."""
        if self._matrices is None:
            most_rows, num_valid = self._agree()
            self._matrices = Matrices(num_valid)
            for gram in self._grams:
                gram.agree(num_valid, most_rows)
        return self._matrices

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


def _by_node(side: Side, rows: Rows) -> dict[Node, Tensor]:
    return {(side, name): value.detach() for name, value in rows.items()}


def _weights(rows: Mapping[Node, Tensor], weights: Tensor | None) -> Tensor:
    first = next(iter(rows.values()))
    return torch.ones(len(first), device=first.device) if weights is None else weights.to(first.device)


def _check_equal_rows(rows: Mapping[Node, Tensor]) -> None:
    (first_side, first), count = next((node, value.shape[0]) for node, value in rows.items())
    for (side, name), value in rows.items():
        if value.shape[0] != count:
            raise ValueError(
                f"The {first_side} layer {first!r} has {count} rows but the {side} layer {name!r} has "
                f"{value.shape[0]}: a similarity compares the same rows. Feed both networks the same batch, and "
                "choose rows (flatten | token | mean | last) so that one row means the same in both."
            )
