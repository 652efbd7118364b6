"""Matrices of a global batch -> a differentiable scalar at this rank's own rows: similarity and statistics joined."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from scale_guide import lookup
from scale_guide.similarity import Preparation, _moments, _rows, debiased_cka
from scale_guide.statistics import Layout, Matrices, Pair, Statistics, Wires, make_plan
from scale_guide.statistics.matrices import exact_products


class Similarity:
    """A similarity by name, with what its file says of itself.

    Args:
        name: A file of scale_guide/similarity, or the path of a file of one's own that ends in .py.

    Attributes:
        rows: How its rows are prepared, a `Preparation`.
        centre: Whether that takes their mean over the global batch off.
        forms: {"gram"} or {"gram", "feature"}: what its matrices can be.
        needs_norms: Whether its feature form takes the sums of squared row norms.

    Raises:
        ValueError: no such file, or one that does not hold what a similarity needs.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.module: ModuleType = lookup.module("similarity", name)
        self.needs_norms = bool(getattr(self.module, "NORMS", False))
        _check(self)
        self.rows: str = self.module.ROWS
        self.centre = self.rows in ("centre", "unit_centre")
        self.forms = {"gram", "feature"} if self.centre and hasattr(self.module, "feature") else {"gram"}
        if lookup.is_path(name):
            _try(self)

    def prepare(self, rows: Tensor) -> Tensor:
        """Returns rows [b, d] as the similarity wants them before centring: of unit length, or as they are."""
        return _rows.unit(rows) if self.rows in ("unit", "unit_centre") else rows

    def of(self, matrices: Matrices, pair: Pair) -> Tensor:
        """Returns the similarity of one pair, a scalar, differentiable in the target's matrices."""
        x, y = pair.nodes
        if x in matrices.grams:
            return self.module.gram(matrices.grams[x], matrices.grams[y])  # type: ignore[no-any-return]
        extra = (_norms(matrices, pair),) if self.needs_norms else ()
        blocks = matrices.features[x], matrices.crosses[pair], matrices.features[y]
        return self.module.feature(*blocks, *extra)  # type: ignore[no-any-return]


def _check(similarity: Similarity) -> None:
    """Raises ValueError if a similarity's file does not hold ROWS, gram and, if at all, feature as it should."""
    name, module = similarity.name, similarity.module
    known = get_args(Preparation)
    if not hasattr(module, "ROWS"):
        raise ValueError(
            f"guidance.similarity={name!r} does not say how its rows are prepared. Set ROWS in it to one of "
            f"{', '.join(known)}."
        )
    if module.ROWS not in known:
        raise lookup.unknown(f"guidance.similarity={name!r}: ROWS", module.ROWS, known)
    arguments = {"gram": ["K", "L"], "feature": ["A", "C", "D"] + ["norms"] * similarity.needs_norms}
    for form, wanted in arguments.items():
        function = getattr(module, form, None)
        if function is None and form == "feature":
            continue
        if not callable(function):
            raise ValueError(
                f"guidance.similarity={name!r} has no function gram(K, L). Write one that returns a scalar."
            )
        try:
            inspect.signature(function).bind(*wanted)
        except TypeError as error:
            raise ValueError(
                f"guidance.similarity={name!r}: {form}{inspect.signature(function)} cannot be called with "
                f"{len(wanted)} arguments ({error}). Define it as {form}({', '.join(wanted)})."
            ) from error


def _try(similarity: Similarity) -> None:
    """Raises ValueError if a user's similarity gives no scalar with gradient, or its two forms differ, on 8 rows."""
    generator = torch.Generator().manual_seed(0)
    rows = [similarity.prepare(torch.randn(8, d, dtype=torch.float64, generator=generator)) for d in (3, 2)]
    x, y = (part - part.mean(dim=0) * similarity.centre for part in rows)
    a, b = x.square().sum(dim=1), y.square().sum(dim=1)
    norms = _moments.Norms(8, a @ b, a @ a, b @ b)
    blocks = [(x.T @ x).requires_grad_(), (x.T @ y).requires_grad_(), y.T @ y]
    values = {"gram": similarity.module.gram((x @ x.T).requires_grad_(), y @ y.T)}
    if "feature" in similarity.forms:
        values["feature"] = similarity.module.feature(*blocks, *[norms] * similarity.needs_norms)
    for form, value in values.items():
        if not (isinstance(value, Tensor) and value.dim() == 0 and value.requires_grad):
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"guidance.similarity={similarity.name!r}: {form} must return a scalar tensor that carries gradient, "
                f"but on random rows it gave {found} without. Compute it from its arguments by torch operations alone."
            )
    results = [float(value.detach()) for value in values.values()]
    if max(results) - min(results) > 1e-6:
        raise ValueError(
            f"guidance.similarity={similarity.name!r}: of the same 8 random rows gram makes {results[0]:.6f} and "
            f"feature {results[1]:.6f}. They must be equal, for layouts choose between them: correct one or remove "
            "feature."
        )


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
    similarities, gradients = {}, Matrices(matrices.num_rows)
    total = torch.zeros((), device=matrices.device)
    # A similarity may multiply matrices: autocast would do that in bf16, forwards and backwards.
    with exact_products(matrices.device):
        for pair in pairs:
            leaves = matrices.of_target(pair).values()
            for leaf in leaves:
                leaf.requires_grad_()
            with torch.enable_grad():
                value = similarity.of(matrices, pair)
                loss = weight * pair.weight * (1 - value)
                # Pair by pair, for each holds several [n, n] matrices in its graph.
                gradients.add_gradients(loss, matrices, pair)
            for leaf in leaves:
                leaf.requires_grad_(False)
            similarities[pair], total = value.detach(), total + loss.detach()
    return Outcome(total, gradients, similarities)


def not_finite(pair: Pair) -> ValueError:
    """Returns the error for a pair whose similarity is NaN: it names the layers and the ways out."""
    return ValueError(
        f"The similarity of {pair} is not a number: one of the two layers gives inf, NaN, or numbers whose squares or "
        "fourth powers leave fp32. If the run diverges, lower optimizer.lr or set optimizer.clip_norm; else choose "
        "other layers."
    )


def _norms(matrices: Matrices, pair: Pair) -> _moments.Norms:
    x, y = pair.nodes
    return _moments.Norms(matrices.num_rows, matrices.products[pair], matrices.squares[x], matrices.squares[y])


@torch.no_grad()
def companions(matrices: Matrices, pair: Pair, *, centred: bool = True) -> tuple[Tensor, ...]:
    """Returns debiased CKA, the permutation floor, and whether target and guide layer have any spread (1 or 0).

    Of the rows as the similarity prepares them, centred: with unit rows these are the figures of CKA on unit rows.

    Args:
        matrices: Of one global batch.
        pair: One of its pairs.
        centred: Whether the matrices are those of centred rows (`Similarity.centre`). If not they are centred here,
            which in fp32 is good to about 1e-7 (|mean| / std)^2; and then only a layer that is exactly constant
            counts as without spread.
    """
    x, y = pair.nodes
    if x in matrices.grams:
        grams = matrices.grams[x], matrices.grams[y]
        moments = _moments.of_grams(*(grams if centred else map(_moments.centred, grams)))
    else:
        blocks = matrices.features[x], matrices.crosses[pair], matrices.features[y]
        moments = _moments.of_features(*blocks, _norms(matrices, pair))
    spread = (moments.traces[1:] != 0).to(moments.traces.dtype)
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


_similarity = functools.cache(Similarity)


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
    wires, pair, similarity = Wires(group), Pair("x", "y"), _similarity(names[estimator])
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
