"""One optimizer step of guidance: micro-batches collected, reduced once over all ranks, and given their gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from scale_guide.layer_rows import LayerRows
from scale_guide.objective import Outcome, Similarity, companions, evaluate, inject
from scale_guide.statistics import Pair, Plan, Statistics, Storage, Wires

GuideRows = Literal["auto", "keep", "recompute"]
KEPT_GUIDE_BYTES = 256 * 2**20
"""guide_rows auto: guide rows that the second pass reads again are kept up to this size, beyond it recomputed."""


class GuidanceStep:
    """The guidance of one optimizer step.

    Use: `take_guide` and then `collect` per micro-batch, `reduce` once, `loss` per micro-batch. What the statistics
    need of the guide is taken before the target runs, so that its rows are gone by then.

    Args:
        plan: The layouts.
        wires: The ranks that share the batch.
        similarity: What is compared.
        num_micro_batches: The most that `collect` takes.
        storage: How rows and gradients are kept between the passes.
        guide_rows: Whether the second pass reads guide rows kept in the first; auto: if they are few.

    Attributes:
        guide_is_in: Whether `take_guide` was called and `collect` was not yet.
        num_collected: Micro-batches so far.
        outcome: What `reduce` found; None before.
        figures: After `reduce`, pair -> [similarity, debiased CKA, null floor, target has spread, guide has spread].
        gradient_square: After `loss`, this rank's share of the squared norm of the gradient at the activations.
    """

    def __init__(
        self,
        plan: Plan,
        wires: Wires,
        similarity: Similarity,
        *,
        num_micro_batches: int,
        storage: Storage,
        guide_rows: GuideRows,
    ) -> None:
        self._wires, self._similarity, self._storage = wires, similarity, storage
        self._num_micro_batches, self._guide_rows = num_micro_batches, guide_rows
        kept = storage if num_micro_batches > 1 else Storage()
        self._statistics = Statistics(plan, wires, centre=similarity.centre, storage=kept)
        self._read_again = list(dict.fromkeys(pair.guide for pair in plan.pairs("covariance")))
        self.guide_is_in = self._keeps_guide = False
        self._kept: list[dict[str, Tensor]] = []
        self._num_used = self.num_collected = 0
        self.outcome: Outcome | None = None
        self.figures: dict[Pair, Tensor] = {}
        self.gradient_square = torch.zeros(())

    @property
    def is_used_up(self) -> bool:
        """Whether every micro-batch collected has had its loss."""
        return self._num_used == self.num_collected

    @property
    def needs_guide_again(self) -> bool:
        """Whether the second pass must run the guide again: feature statistics read its rows beside the target's."""
        return bool(self._read_again) and not self._keeps_guide

    def take_guide(self, guide: LayerRows) -> None:
        """Takes the guide's rows of one micro-batch, leaving in `guide` only those that are read again.

        Collective if a step has one micro-batch: the guide's Gram matrices are reduced at once. Else local.

        Raises:
            ValueError: as `collect`, or of a single micro-batch as `reduce`.
        """
        if self.num_collected == self._num_micro_batches:
            raise ValueError(
                f"guidance.collect() was called more often than num_micro_batches={self._num_micro_batches} in one "
                "step. Pass Guidance(num_micro_batches=k) with the number of micro-batches of a step."
            )
        self._statistics.add_guide(guide.rows, guide.weights, padding=guide.padding)
        if self._num_micro_batches == 1:
            self._statistics.reduce_guide()
        self.guide_is_in = True
        self.leave_read_again(guide)

    def leave_read_again(self, guide: LayerRows) -> None:
        """Drops from `guide` the rows that feature statistics do not read."""
        guide.rows = {name: guide.rows[name] for name in self._read_again}

    def collect(self, target: LayerRows, guide: LayerRows) -> None:
        """Adds one micro-batch. Local, if `take_guide` came before.

        Raises:
            ValueError: unequal numbers of rows, or more micro-batches than there should be.
        """
        if not self.guide_is_in:
            self.take_guide(guide)
        self._statistics.add_target(target.rows, guide.rows, target.weights, padding=target.padding)
        if not self.num_collected:
            self._keeps_guide = self._num_micro_batches > 1 and self._would_keep(guide.rows)
        if self._keeps_guide:
            self._kept.append({name: self._storage.rows(rows) for name, rows in guide.rows.items()})
        self.num_collected += 1
        self.guide_is_in = False

    def reduce(self, pairs: Sequence[Pair], weight: float) -> None:
        """Computes similarities and gradients over all ranks and micro-batches. Collective: call on every rank.

        Raises:
            ValueError: fewer than 4 rows in the global batch.
        """
        matrices = self._statistics.reduce()
        self.outcome = evaluate(matrices, self._similarity, pairs, weight)
        values, centred = self.outcome.similarities.items(), self._similarity.centre
        self.figures = {p: torch.stack([value, *companions(matrices, p, centred=centred)]) for p, value in values}
        self._statistics.send_back(self.outcome.gradients)
        self.gradient_square = self.outcome.loss.new_zeros(())

    def loss(self, target: LayerRows, guide: LayerRows) -> Tensor:
        """Returns the next micro-batch's part of the loss, a scalar whose backward reaches its target rows. Local."""
        assert self.outcome is not None, "made by reduce()"
        read: Mapping[str, Tensor] = self._kept.pop(0) if self._kept else guide.rows
        rows = {name: value.to(self.outcome.loss.device) for name, value in read.items()}
        gradients = {
            layer: self._statistics.rows_gradient(self._num_used, layer, x, rows, target.weights)
            for layer, x in target.rows.items()
            if x.requires_grad
        }
        for gradient in gradients.values():
            # In place: the guidance reads this very tensor after the step is gone.
            self.gradient_square += (torch.linalg.vector_norm(gradient) / self._wires.size).square()
        self._num_used += 1
        return inject(self.outcome.loss / self.num_collected, target.rows, gradients)

    def _would_keep(self, rows: Mapping[str, Tensor]) -> bool:
        if self._guide_rows != "auto":
            return self._guide_rows == "keep"
        size = sum(value.numel() * value.element_size() for value in rows.values())
        return size * self._num_micro_batches <= KEPT_GUIDE_BYTES
