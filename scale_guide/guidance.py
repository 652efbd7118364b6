"""The guidance loss: which layers, which rows, the sum over pairs, its weight, and what it says of itself."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scale_guide.activations import first_tensor
from scale_guide.guide import Guide
from scale_guide.layer_map import Collision, PairSpec, make_pairs
from scale_guide.layer_rows import LayerReader, LayerRows
from scale_guide.objective import Similarity, not_finite
from scale_guide.rows import How
from scale_guide.statistics import Layout, Node, Pair, Plan, Storage, Wires, count_bytes, make_plan
from scale_guide.step import GuidanceStep, GuideRows
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
        similarity: A file of scale_guide/similarity, or the path of a file of one's own that ends in .py.
        weight: Of the guidance loss; may be changed between steps.
        rows: What one row is: flatten | token | mean | last.
        collision: Several guide layers on one target layer: sum | last | mean.
        layout: How the statistics cross the ranks: auto | gather | transpose | covariance.
        plan: The layouts, chosen beforehand; None: chosen in the first step. Known beforehand, the first step too
            drops the guide's rows early.
        overwritten: (target, guide) layers known to be overwritten in place; None: found out in the first pass.
        num_micro_batches: k, the most micro-batches that a step has.
        storage: How the Gram layouts keep rows and gradients between the passes of k > 1.
        guide_rows: For the second pass of k > 1, feature statistics `keep` the guide's rows of every micro-batch, or
            `recompute` them (then memory is free of k); auto keeps up to 256 MB.
        group: Process group over which the engine averages gradients; None: the default one.

    Attributes:
        pairs: The pairs, once known: at once if given ready, else after the first forward pass.
        plan: The layouts chosen, after the first step.
        watch: While `watch.is_on`, the gradients at the guided layers are measured; not in compiled code.

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
        plan: Plan | None = None,
        overwritten: tuple[Sequence[str], Sequence[str]] | None = None,
        num_micro_batches: int = 1,
        storage: Storage = Storage(),  # noqa: B008 - frozen
        guide_rows: GuideRows = "auto",
        group: Any = None,
    ) -> None:
        self.weight = weight
        self.guide = guide if isinstance(guide, Guide) else Guide(guide, device=_device(target))
        self.pairs: list[Pair] = []
        self.plan = plan
        self._spec, self._collision, self._layout = pairs, collision, layout
        self._num_micro_batches = num_micro_batches
        self._keeping: dict[str, Any] = {"storage": storage, "guide_rows": guide_rows}
        self._similarity, self._wires = Similarity(similarity), Wires(group)
        copied = overwritten or (None, None)
        read: dict[str, Any] = {"how": rows, "similarity": self._similarity}
        self._target = LayerReader("target", target, target_layers, overwritten=copied[0], **read)
        self._guide = LayerReader("guide", self.guide.model, guide_layers, overwritten=copied[1], **read)
        if not isinstance(pairs, str) and pairs and all(isinstance(pair, Pair) for pair in pairs):
            self._set_pairs([pair for pair in pairs if isinstance(pair, Pair)])
        self.watch = self._target.recorder.watch
        self._step: GuidanceStep | None = None
        self._figures: dict[Pair, Tensor] = {}
        self._gradient_square = torch.zeros(())
        self._now = _MicroBatch()
        self._clock = Stopwatch()
        self._num_bytes = 0
        self._warned: set[Node] = set()

    @contextmanager
    def record(self, *, weights: Tensor | None = None, mask: Tensor | None = None) -> Iterator[None]:
        """Arms the hooks for one micro-batch.

        Args:
            weights: 1 or 0 for each example [B]; an example of weight 0 counts as never there. None: all count.
            mask: True for real tokens [B, T] of sequences.

        Raises:
            ValueError: an earlier micro-batch of this step broke off.
        """
        if self._step is not None and self._step.guide_is_in:
            if self._step.num_collected:
                raise ValueError(
                    "A micro-batch broke off between guidance.run_guide() and guidance.collect(), so the step lacks "
                    "it. Call guidance.reset() and begin the step anew."
                )
            self.reset()
        if self._step is None:
            self._num_bytes = 0
            self._clock.restart()
            self.watch.reset()
        self._now = _MicroBatch(weights, mask)
        with self._target.recorder.record():
            yield

    def run_guide(self, inputs: Any) -> Any:
        """Returns the guide's output for inputs [B, ...] of this rank, without gradient. Call in `record()`, first.

        From the second step on (from the first with a `plan`) the statistics take what they need of the guide here,
        so its rows are dropped before the target runs; with one micro-batch a step this is collective.
        """
        with self._clock, self._guide.recorder.record():
            output = self.guide(inputs)
        with self._clock, count_bytes() as sent:
            now = self._now
            now.guide = self._guide.take(weights=now.weights, mask=now.mask)
            seen = first_tensor(inputs)
            if seen is not None:
                # A guide on the host hands its rows over to where the target computes.
                now.guide.rows = {name: rows.to(seen.device) for name, rows in now.guide.rows.items()}
            if self._step is not None and self._step.outcome is not None:
                self._step.leave_read_again(now.guide)
            elif self.plan is not None:
                (self._step or self._new_step(self.plan)).take_guide(now.guide)
        self._num_bytes += sent.num_bytes
        return output

    def collect(self) -> None:
        """Adds the recorded micro-batch to the step's statistics. Local: no rank speaks to another, but for the first.

        Raises:
            ValueError: no pairs, layers that did not run, unequal numbers of rows, or more micro-batches than
                `num_micro_batches`.
        """
        with self._clock:
            target, guide = self._recorded()
            step = self._step or self._new_step(self.plan or self._first_step(target, guide))
            step.collect(target, guide)

    def reduce(self) -> None:
        """Computes similarities and gradients over all ranks and micro-batches. Collective: call on every rank.

        Raises:
            ValueError: nothing was collected, or fewer than 4 rows in the global batch.
        """
        if self._step is None:
            raise ValueError("guidance.reduce() was called before guidance.collect(): there is nothing to reduce.")
        with self._clock, count_bytes() as sent:
            self._step.reduce(self.pairs, self.weight)
        self._num_bytes += sent.num_bytes
        self._figures, self._gradient_square = self._step.figures, self._step.gradient_square

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
        with self._clock:
            value = step.loss(*self._recorded())
        if step.is_used_up:
            self.reset()
        return value

    @property
    def needs_guide_again(self) -> bool:
        """Whether the second pass over micro-batches must run the guide again: feature statistics read its rows."""
        return self._step is not None and self._step.needs_guide_again

    @property
    def last(self) -> dict[str, Any]:
        """The last step's figures, alike on every rank unless said otherwise; reading them waits for the device.

        pairs: "target <- guide" -> {similarity, debiased, floor}; gradient_square: this rank's share of the squared
        norm of the gradient at the activations (sum it over ranks); watched: this rank's `watch.sums()`; seconds: its
        time in guidance, the guide's forward included; bytes: what it handed to collectives.

        Raises:
            ValueError: a similarity that is not a number, on every rank alike.
        """
        names = ("similarity", "debiased", "floor")
        pairs = {}
        table = torch.stack(list(self._figures.values())).tolist() if self._figures else []
        for pair, (*row, ours, theirs) in zip(self._figures, table, strict=True):
            if not math.isfinite(row[0]):
                raise not_finite(pair)
            pairs[str(pair)] = dict(zip(names, row, strict=True))
            self._warn_of_no_spread(pair, (ours, theirs))
        square, watched = float(self._gradient_square), self.watch.sums()
        facts = {"seconds": self._clock.seconds(), "bytes": self._num_bytes}
        return {"pairs": pairs, "gradient_square": square, "watched": watched, **facts}

    def reset(self) -> None:
        """Forgets the step under way, as after an exception in the middle of it."""
        self._step, self._now = None, _MicroBatch()

    def close(self) -> None:
        """Removes every hook from both networks."""
        self._target.recorder.close()
        self._guide.recorder.close()

    def _new_step(self, plan: Plan) -> GuidanceStep:
        self._step = GuidanceStep(
            plan, self._wires, self._similarity, num_micro_batches=self._num_micro_batches, **self._keeping
        )
        return self._step

    def _recorded(self) -> tuple[LayerRows, LayerRows]:
        """Returns the target's and the guide's rows of this micro-batch."""
        now = self._now
        if not now.target.rows:
            now.target = self._target.take(weights=now.weights, mask=now.mask, needs_graph=True)
        if not self.pairs:
            self._set_pairs(make_pairs(self._spec, list(now.target.rows), list(now.guide.rows), self._collision))
            for side, names in ((now.target, self._target.recorder.keep), (now.guide, self._guide.recorder.keep)):
                side.rows = {name: rows for name, rows in side.rows.items() if name in (names or ())}
        return now.target, now.guide

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
        self._target.recorder.keep = {pair.target for pair in pairs}
        self._guide.recorder.keep = {pair.guide for pair in pairs}

    def _first_step(self, target: LayerRows, guide: LayerRows) -> Plan:
        """Returns the plan, made from numbers that all ranks share; checks the guide. Collective."""
        bad = self.guide.check_finite(guide.rows)
        rows = next(iter(target.rows.values()))
        told = [rows.shape[0], 0 if bad is None else 1 + list(guide.rows).index(bad)]
        everyone = self._wires.exchange(told, rows.device)
        worst = max(which for _, which in everyone)
        if worst:
            raise self.guide.overflow(list(guide.rows)[worst - 1])
        widths: dict[Node, int] = {("target", name): value.shape[1] for name, value in target.rows.items()}
        widths |= {("guide", name): value.shape[1] for name, value in guide.rows.items()}
        most = max(count for count, _ in everyone) * self._wires.size * self._num_micro_batches
        padded = any(side.padding is not None and side.padding.layers for side in (target, guide))
        forms = self._similarity.forms - ({"feature"} if padded and self._layout != "covariance" else set())
        self.plan = make_plan(self.pairs, widths, most, self._wires.size, forms, self._layout)
        return self.plan


@dataclass
class _MicroBatch:
    """What was recorded last, and which of its examples and positions count."""

    weights: Tensor | None = None
    mask: Tensor | None = None
    target: LayerRows = field(default_factory=LayerRows)
    guide: LayerRows = field(default_factory=LayerRows)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
