"""Matrices of a global batch -> a differentiable scalar at this rank's own rows: similarity and statistics joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from scale_guide import lookup
from scale_guide.similarity import _moments, debiased_cka
from scale_guide.statistics import Layout, Matrices, Pair, Statistics, Wires, make_plan


class Similarity:
    """A similarity by name, with what its file says of itself.

    Args:
        name: A file of scale_guide/similarity.

    Raises:
        ValueError: no such file.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.module: ModuleType = lookup.module("similarity", name)
        self.rows: str = self.module.ROWS
        self.needs_norms = bool(getattr(self.module, "NORMS", False))
        self.forms = {form for form in ("gram", "feature") if hasattr(self.module, form)}

    def prepare(self, rows: Tensor) -> Tensor:
        """Returns rows [b, d] as the similarity wants them before centring: of unit length, or as they are."""
        return torch.nn.functional.normalize(rows, dim=1) if self.rows == "unit" else rows

    def of(self, matrices: Matrices, pair: Pair) -> Tensor:
        """Returns the similarity of one pair, a scalar, differentiable in the target's matrices."""
        x, y = pair.nodes
        if x in matrices.grams:
            return self.module.gram(matrices.grams[x], matrices.grams[y])  # type: ignore[no-any-return]
        extra = (_norms(matrices, pair),) if self.needs_norms else ()
        blocks = matrices.features[x], matrices.crosses[pair], matrices.features[y]
        return self.module.feature(*blocks, *extra)  # type: ignore[no-any-return]


@dataclass
class Outcome:
    """What one step's matrices give.

    Attributes:
        loss: weight * sum over pairs of pair.weight * (1 - similarity), a scalar.
        gradients: d(loss) / d(matrices of the target).
        similarities: Pair -> similarity, a scalar.
    """

    loss: Tensor
    gradients: Matrices
    similarities: dict[Pair, Tensor]


def evaluate(matrices: Matrices, similarity: Similarity, pairs: Sequence[Pair], weight: float) -> Outcome:
    """Returns the outcome of one global batch; equal on every rank, and no rank speaks to another."""
    leaves = matrices.of_target()
    for leaf in leaves:
        leaf.requires_grad_()
    with torch.enable_grad():
        similarities = {pair: similarity.of(matrices, pair) for pair in pairs}
        loss = torch.stack([weight * pair.weight * (1 - value) for pair, value in similarities.items()]).sum()
        gradients = matrices.gradients(loss)
    for leaf in leaves:
        leaf.requires_grad_(False)
    return Outcome(loss.detach(), gradients, {pair: value.detach() for pair, value in similarities.items()})


def _norms(matrices: Matrices, pair: Pair) -> _moments.Norms:
    x, y = pair.nodes
    return _moments.Norms(matrices.num_rows, matrices.products[pair], matrices.squares[x], matrices.squares[y])


@torch.no_grad()
def companions(matrices: Matrices, pair: Pair) -> tuple[Tensor, ...]:
    """Returns debiased CKA, the permutation floor, and whether target and guide layer have any spread (1 or 0)."""
    x, y = pair.nodes
    if x in matrices.grams:
        moments = _moments.of_grams(matrices.grams[x], matrices.grams[y])
    else:
        blocks = matrices.features[x], matrices.crosses[pair], matrices.features[y]
        moments = _moments.of_features(*blocks, _norms(matrices, pair))
    spread = ((trace != 0).to(trace) for trace in (moments.target_trace, moments.guide_trace))
    return debiased_cka.of_moments(moments), _moments.null_floor(moments), *spread


class _Inject(torch.autograd.Function):
    """Passes a value through; its backward hands `rows` the gradient computed in the forward: no collective there."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rows: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = rows.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        """Returns grad_output for the value and grad_output * gradient for the rows."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The guidance loss has first derivatives only: its gradient is computed in the forward pass. Take "
                "create_graph=True of the other losses alone."
            )
        (gradient,) = ctx.saved_tensors
        return grad_output, (grad_output * gradient).to(ctx.dtype), None


def inject(value: Tensor, rows: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
    """Returns `value`, whose backward adds grad_output * gradient to each layer's rows. Double backward raises.

    Every backward of the chain runs before the target's own (autograd runs what was recorded last first), so each
    layer's gradient is freed as it is handed over.
    """
    for layer, gradient in gradients.items():
        value = _Inject.apply(value, rows[layer], gradient)
    return value


def linear_cka(
    x: Tensor,
    y: Tensor,
    *,
    estimator: Literal["biased", "debiased"] = "biased",
    layout: Layout | Literal["auto"] = "auto",
    group: Any = None,
) -> Tensor:
    """Returns linear CKA over the rows of all ranks, a scalar alike on every rank, differentiable in x.

    Collective: call on every rank. The gradient follows the data-parallel convention: after the engine's mean over
    ranks it is the gradient of the global value. Works without any process group.

    Args:
        x: Target rows [b, p] of this rank.
        y: Guide rows [b, q] of this rank, in any floating dtype; no gradient flows to them.
        estimator: biased (Kornblith et al. 2019) or debiased (Song et al. 2012).
        layout: How the statistics cross the ranks; every layout gives the same number.
        group: Process group; None: the default one.

    Raises:
        ValueError: not two matrices of equally many rows, fewer than 4 rows in all, an unknown name, or ranks whose
            numbers of rows differ so much that auto would choose another layout on each (name one).
    """
    names = {"biased": "cka", "debiased": "debiased_cka"}
    if estimator not in names:
        raise lookup.unknown("estimator", estimator, names)
    if x.dim() != 2 or y.dim() != 2:
        raise ValueError(f"linear_cka compares rows x [b, p] and y [b, q], got {tuple(x.shape)} and {tuple(y.shape)}.")
    wires, pair, similarity = Wires(group), Pair("x", "y"), Similarity(names[estimator])
    widths = {pair.nodes[0]: x.shape[1], pair.nodes[1]: y.shape[1]}
    differentiable = torch.is_grad_enabled() and x.requires_grad
    plan = make_plan([pair], widths, x.shape[0] * wires.size, wires.size, similarity.forms, layout)
    statistics = Statistics(plan, wires, norms=similarity.needs_norms)
    statistics.add({"x": x}, {"y": y})
    matrices = statistics.reduce()
    if not differentiable:
        return similarity.of(matrices, pair)
    outcome = evaluate(matrices, similarity, [pair], weight=-1.0)
    statistics.send_back(outcome.gradients)
    return inject(outcome.loss + 1.0, {"x": x}, {"x": statistics.rows_gradient(0, "x", x, {"y": y})})
