"""The guidance loss: which layers, which rows, the sum over pairs, its weight, and what it says of itself."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scale_guide.activations import Activation, Recorder
from scale_guide.guide import Guide
from scale_guide.layer_map import Collision, PairSpec, candidates, guidable, make_pairs
from scale_guide.objective import Outcome, Similarity, companions, evaluate, inject
from scale_guide.rows import How, select
from scale_guide.statistics import Layout, Node, Pair, Plan, Statistics, Wires, count_bytes, make_plan
from scale_guide.stopwatch import Stopwatch


class Guidance:
    """Pulls `target` towards `guide`: weight * sum over layer pairs of 1 - similarity, over the global batch.

    Make it after the engine wrapped the target (pass the bare module) and before the first forward pass.

        with guidance.record():
            guidance.run_guide(x)
            output = target(x)
        loss = task_loss(output, y) + guidance.loss()

    With several micro-batches a step: first `collect()` each under no_grad, then `reduce()` once, then run each again
    with grad and add its `loss()`; the k losses sum to the guidance loss of the step, and their gradients to its
    gradient. The gradient follows the data-parallel convention: it is exact after the engine's mean over ranks.

    Args:
        target: The network that is trained, unwrapped.
        guide: A `Guide`, or a module that becomes one.
        pairs: even (Algorithm 1), a list of [target layer, guide layer] names or globs, or ready `Pair`s.
        target_layers: weights | blocks | released | a list of names or globs.
        guide_layers: The same for the guide.
        similarity: A file of scale_guide/similarity.
        weight: Of the guidance loss; may be changed between steps.
        rows: What one row is: flatten | token | mean | last.
        collision: Several guide layers on one target layer: sum | last | mean.
        layout: How the statistics cross the ranks: auto | gather | transpose | covariance.
        overwritten: (target, guide) layers known to be overwritten in place; None: found out in the first pass.
        num_micro_batches: How many micro-batches make a step; read by the choice of layout alone.
        group: Process group over which the engine averages gradients; None: the default one.

    Attributes:
        pairs: The pairs, once known: at once if given ready, else after the first forward pass.
        plan: The layouts chosen, after the first step.

    Raises:
        ValueError: an unknown similarity, layer list or layer.
    """

    def __init__(
        self,
        target: nn.Module,
        guide: nn.Module,
        *,
        pairs: PairSpec | Sequence[Pair] = "even",
        target_layers: str | Sequence[str] = "weights",
        guide_layers: str | Sequence[str] = "weights",
        similarity: str = "cka",
        weight: float = 1.0,
        rows: How = "flatten",
        collision: Collision = "sum",
        layout: Layout | Literal["auto"] = "auto",
        overwritten: tuple[Sequence[str], Sequence[str]] | None = None,
        num_micro_batches: int = 1,
        group: Any = None,
    ) -> None:
        self.weight = weight
        self.guide = guide if isinstance(guide, Guide) else Guide(guide, device=_device(target))
        self.pairs: list[Pair] = []
        self.plan: Plan | None = None
        self._spec, self._collision, self._rows, self._layout = pairs, collision, rows, layout
        self._lists, self._num_micro_batches = (target_layers, guide_layers), num_micro_batches
        self._similarity, self._wires = Similarity(similarity), Wires(group)
        copied = overwritten or (None, None)
        self._target = Recorder(target, candidates(target, target_layers), overwritten=copied[0])
        self._guide = Recorder(self.guide.model, candidates(self.guide.model, guide_layers), overwritten=copied[1])
        if not isinstance(pairs, str) and pairs and all(isinstance(pair, Pair) for pair in pairs):
            self._set_pairs([pair for pair in pairs if isinstance(pair, Pair)])
        self._step: _Step | None = None
        self._now = _MicroBatch()
        self._clock = Stopwatch()
        self._figures: dict[Pair, Tensor] = {}
        self._gradient_square = torch.zeros(())
        self._num_bytes = 0
        self._warned: set[Node] = set()

    @contextmanager
    def record(self, *, weights: Tensor | None = None, mask: Tensor | None = None) -> Iterator[None]:
        """Arms the hooks for one micro-batch.

        Args:
            weights: 1 or 0 for each example [B]; an example of weight 0 counts as never there. None: all count.
            mask: True for real tokens [B, T], for rows token, mean and last.
        """
        if self._step is None:
            self._clock.restart()
        self._now = _MicroBatch(weights, mask)
        with self._target.record():
            yield

    def run_guide(self, inputs: Any) -> None:
        """Runs the guide on inputs [B, ...] of this rank, without gradient. Call inside `record()`, first."""
        with self._clock, self._guide.record():
            self.guide(inputs)
        with self._clock:
            self._now.guide = self._take(self._guide, self._lists[1])

    def collect(self) -> None:
        """Adds the recorded micro-batch to the step's statistics. Local: no rank speaks to another, but for the first.

        Raises:
            ValueError: no pairs, layers that did not run, or unequal numbers of rows.
        """
        with self._clock:
            target, guide = self._recorded()
            if self._step is None:
                plan = self.plan or self._first_step(target, guide)
                self._step = _Step(Statistics(plan, self._wires, centre=self._similarity.rows == "centre"))
            self._step.statistics.add(target, guide, self._now.row_weights)
            self._step.num_collected += 1

    def reduce(self) -> None:
        """Computes similarities and gradients over all ranks and micro-batches. Collective: call on every rank.

        Raises:
            ValueError: nothing was collected, or fewer than 4 rows in the global batch.
        """
        step = self._step
        if step is None:
            raise ValueError("guidance.reduce() was called before guidance.collect(): there is nothing to reduce.")
        with self._clock, count_bytes() as sent:
            matrices = step.statistics.reduce()
            step.outcome = evaluate(matrices, self._similarity, self.pairs, self.weight)
            values = step.outcome.similarities.items()
            self._figures = {pair: torch.stack([value, *companions(matrices, pair)]) for pair, value in values}
            step.statistics.send_back(step.outcome.gradients)
        self._num_bytes = sent.num_bytes
        self._gradient_square = step.outcome.loss.new_zeros(())

    def loss(self) -> Tensor:
        """Returns the guidance loss, a scalar alike on every rank, whose backward reaches this rank's recorded rows.

        Collective when k = 1, for it then does `collect` and `reduce` itself. After `reduce` it is local, is called
        once per micro-batch in the order collected, and returns the k-th part of the loss.
        """
        if self._step is None or self._step.outcome is None:
            self.collect()
            self.reduce()
        step = self._step
        assert step is not None, "made by collect()"
        assert step.outcome is not None, "made by reduce()"
        with self._clock:
            target, guide = self._recorded()
            gradients = {
                layer: step.statistics.rows_gradient(step.num_used, layer, rows, guide, self._now.row_weights)
                for layer, rows in target.items()
                if rows.requires_grad
            }
            for gradient in gradients.values():
                self._gradient_square += (torch.linalg.vector_norm(gradient) / self._wires.size).square()
            value = inject(step.outcome.loss / step.num_collected, target, gradients)
            step.num_used += 1
        if step.num_used == step.num_collected:
            self._step, self._now = None, _MicroBatch()
        return value

    @property
    def needs_guide_again(self) -> bool:
        """Whether the second pass over micro-batches must run the guide again: feature statistics read its rows."""
        return self.plan is not None and bool(self.plan.pairs("covariance"))

    @property
    def last(self) -> dict[str, Any]:
        """The last step's figures, alike on every rank unless said otherwise; reading them waits for the device.

        pairs: "target <- guide" -> {similarity, debiased, floor}; gradient_square: this rank's share of the squared
        norm of the gradient at the activations (sum it over ranks); seconds: this rank's time in guidance, the
        guide's forward included; bytes: what this rank handed to collectives.
        """
        names = ("similarity", "debiased", "floor")
        pairs = {}
        table = torch.stack(list(self._figures.values())).tolist() if self._figures else []
        for pair, (*row, ours, theirs) in zip(self._figures, table, strict=True):
            pairs[str(pair)] = dict(zip(names, row, strict=True))
            self._warn_of_no_spread(pair, (ours, theirs))
        square = float(self._gradient_square)
        return {"pairs": pairs, "gradient_square": square, "seconds": self._clock.seconds(), "bytes": self._num_bytes}

    def close(self) -> None:
        """Removes every hook from both networks."""
        self._target.close()
        self._guide.close()

    def _recorded(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns the target's and the guide's rows of this micro-batch, by layer."""
        now = self._now
        if not now.target:
            now.target = self._take(self._target, self._lists[0], needs_graph=True)
        if not self.pairs:
            self._set_pairs(make_pairs(self._spec, list(now.target), list(now.guide), self._collision))
        target = {pair.target: now.target[pair.target] for pair in self.pairs}
        # A guide on the host hands its rows over to where the target computes (its weights may be elsewhere).
        device = next(iter(target.values())).device
        guide = {p.guide: now.guide[p.guide].to(device) for p in self.pairs if p.guide in now.guide}
        return target, guide

    def _take(
        self, recorder: Recorder, layers: str | Sequence[str], *, needs_graph: bool = False
    ) -> dict[str, Tensor]:
        fired = recorder.take(needs_graph=needs_graph)
        names = guidable(fired, layers) if recorder.keep is None else fired
        return {name: self._similarity.prepare(self._select(fired[name])) for name in names}

    def _select(self, activation: Activation) -> Tensor:
        rows, self._now.row_weights = select(
            activation.output,
            self._rows,
            mask=self._now.mask,
            weights=self._now.weights,
            channels_first=activation.channels_first,
        )
        return rows

    def _warn_of_no_spread(self, pair: Pair, traces: tuple[float, float]) -> None:
        for (side, name), trace in zip(pair.nodes, traces, strict=True):
            if trace == 0 and (side, name) not in self._warned and self._wires.rank == 0:
                warnings.warn(
                    f"The {side} layer {name!r} has no spread over the batch (all its rows are equal): its similarity "
                    "is 0 and no gradient comes from it.",
                    stacklevel=3,
                )
            self._warned |= {(side, name)} if trace == 0 else set()

    def _set_pairs(self, pairs: list[Pair]) -> None:
        self.pairs = pairs
        self._target.keep = {pair.target for pair in pairs}
        self._guide.keep = {pair.guide for pair in pairs}

    def _first_step(self, target: dict[str, Tensor], guide: dict[str, Tensor]) -> Plan:
        """Returns the plan, made from numbers that all ranks share; checks the guide. Collective."""
        bad = self.guide.check_finite(guide)
        rows = next(iter(target.values()))
        told = [rows.shape[0], 0 if bad is None else 1 + list(guide).index(bad)]
        everyone = self._wires.exchange(told, rows.device)
        worst = max(which for _, which in everyone)
        if worst:
            raise self.guide.overflow(list(guide)[worst - 1])
        widths: dict[Node, int] = {("target", name): value.shape[1] for name, value in target.items()}
        widths |= {("guide", name): value.shape[1] for name, value in guide.items()}
        most = max(count for count, _ in everyone) * self._wires.size * self._num_micro_batches
        self.plan = make_plan(self.pairs, widths, most, self._wires.size, self._similarity.forms, self._layout)
        return self.plan


@dataclass
class _MicroBatch:
    """What was recorded last: rows by layer, and which of them count."""

    weights: Tensor | None = None
    mask: Tensor | None = None
    row_weights: Tensor | None = None
    target: dict[str, Tensor] = field(default_factory=dict)
    guide: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Step:
    """One optimizer step under way."""

    statistics: Statistics
    outcome: Outcome | None = None
    num_collected: int = 0
    num_used: int = 0


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
