"""The optimizer step: k micro-batches on W processes that equal one graph over the global batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scale_guide import bad_steps
from scale_guide.config import OptimizerConfig, Recipe
from scale_guide.distillation import Distillation
from scale_guide.engine import Engine
from scale_guide.guidance import Guidance
from scale_guide.guide import Guide
from scale_guide.objective import inject
from scale_guide.reading import DATA, Draws, Reading, as_read
from scale_guide.running_statistics import paused, snapshot
from scale_guide.tasks import Batch, Task


@dataclass
class StepLog:
    """What one optimizer step leaves: tensors on the device, read only when a line is logged."""

    task_sum: Tensor | None
    """Sum of the task loss over this rank's scored terms, scalar; None where it was not computed."""
    count: Tensor
    """Scored terms of the global batch, scalar."""
    guidance_loss: Tensor | None
    """Weighted sum of 1 - similarity over the pairs, scalar; None without guidance."""
    distillation_sum: Tensor | None
    """Weighted sum of the distillation loss over this rank's scored terms, scalar; None where there is none."""
    agreed: Callable[[], list[float]]
    """Sums over ranks of [scored terms, ranks asked to stop, unreadable rows]."""
    trace: Callable[[], str] | None = None
    """If the update was skipped because a gradient was not finite: says where that began. Collective."""

    def is_finite(self, engine: Engine) -> bool:
        """Returns whether every loss of every rank is a number. Collective."""
        losses = [loss for loss in (self.task_sum, self.guidance_loss, self.distillation_sum) if loss is not None]
        return bool(torch.isfinite(engine.sum(torch.stack([loss.double() for loss in losses]))).all())


def guided_step(
    micro_batches: Sequence[Batch],
    *,
    target: nn.Module,
    task: Task,
    engine: Engine,
    guidance: Guidance | None = None,
    distillation: Distillation | None = None,
    accumulation: str = "exact",
    reading: Reading = DATA,
    seed: int = 0,
    step: int = 0,
    stop: bool = False,
) -> StepLog:
    """Returns the losses of one optimizer step, having done it. Collective.

    Every micro-batch's loss is W * (its task sum + its distillation sum) / (global count) + guidance, so that after
    the engine's mean over the W ranks the gradient is that of one graph over the global batch. With several
    micro-batches the guidance needs two passes: the first, without gradients, gathers the statistics of all of them.

    Args:
        micro_batches: This rank's k micro-batches, on the host.
        target: The prepared network.
        task: Gives sums and counts.
        engine: The target's engine.
        guidance: Registered on the unwrapped target; None: no representations are compared.
        distillation: What pulls the output; None: nothing. It rests in the warm-up.
        accumulation: exact, or per_micro_batch: the mean over micro-batches of each one's own guidance loss.
        reading: What the networks read, and whether the step belongs to the warm-up.
        seed: Of dropout, noise and order.
        step: Index of this step, for the same.
        stop: Whether this rank was asked to stop; all ranks learn of it through `agreed`.
    """
    warmup = reading.warmup is not None
    assert guidance is not None or not warmup, "a warm-up minimises the guidance loss"
    totals = _agree(micro_batches, task, engine, stop)
    agreed, count = _later(totals), totals[0].clamp_min(1)
    draws = Draws(seed, step, engine.rank, engine.world_size)
    micro_batches = as_read(micro_batches, task, reading, draws)
    pull = None if warmup else distillation
    forward = _Forward(target, engine, guidance, pull, draws)
    k = len(micro_batches)
    two_passes = guidance is not None and k > 1 and accumulation == "exact"
    if two_passes:
        _gather_statistics(micro_batches, forward)
    restore = snapshot(engine.unwrap(target))
    sums: dict[str, list[Tensor]] = {"task": [], "pull": [], "guidance": []}
    for j, host_batch in enumerate(micro_batches):
        batch = engine.to_device(host_batch)
        with engine.micro_batch(last=j == k - 1):
            outputs = forward(batch, j)
            parts = {
                "task": _task_sum(outputs[0], batch, task, learns=not warmup) if reading.target_sees_data else None,
                "pull": pull.loss(*outputs, task.scored(batch)) if pull is not None else None,
                "guidance": guidance.loss() / (1 if two_passes else k) if guidance is not None else None,
            }
            engine.backward(_joined(outputs[0], **parts, scale=engine.world_size / count, warmup=warmup))
        for name, value in parts.items():
            sums[name] += [] if value is None else [value.detach().to(count)]
    engine.step()
    trace = None
    if engine.step_was_skipped:
        restore()
        trace = partial(bad_steps.trace, micro_batches, forward.plainly, forward.networks, engine)
    return StepLog(_sum(sums["task"]), count, _sum(sums["guidance"]), _sum(sums["pull"]), agreed, trace)


@dataclass
class _Forward:
    """The forward passes of one step: the guide's, if it is needed, and the target's.

    Both passes over micro-batch j draw the same masks.
    """

    target: nn.Module
    engine: Engine
    guidance: Guidance | None
    distillation: Distillation | None
    draws: Draws
    guide_too: bool = True
    """Whether the guidance still needs the guide."""

    def __call__(self, batch: Batch, j: int) -> tuple[Any, Any]:
        """Returns the target's output on this rank's micro-batch j and the guide's, None where it did not run."""
        torch.manual_seed(self.draws.seed_of(j))
        inputs = batch.get("guide_input", batch["input"])
        guide_output = None
        if self.distillation is not None and (self.guidance is None or not self.guide_too):
            guide_output = self.distillation.guide(inputs)
        if self.guidance is None:
            return self.engine.forward(self.target, batch["input"]), guide_output
        with self.guidance.record(weights=batch.get("weight"), mask=batch.get("common_mask", batch.get("mask"))):
            if self.guide_too:
                guide_output = self.guidance.run_guide(inputs)
            return self.engine.forward(self.target, batch["input"]), guide_output

    def plainly(self, batch: Batch, j: int) -> None:
        """Runs both networks on micro-batch j and records nothing."""
        torch.manual_seed(self.draws.seed_of(j))
        for guide in self._guides:
            guide(batch.get("guide_input", batch["input"]))
        self.engine.forward(self.target, batch["input"])

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The bare networks by their side."""
        guides: dict[str, nn.Module] = {"guide": self._guides[0].model} if self._guides else {}
        return guides | {"target": self.engine.unwrap(self.target)}

    @property
    def _guides(self) -> list[Guide]:
        """The guide, if there is one."""
        user = self.guidance or self.distillation
        return [] if user is None else [user.guide]


def _gather_statistics(micro_batches: Sequence[Batch], forward: _Forward) -> None:
    """Does the first pass: the statistics of all micro-batches, reduced over ranks."""
    engine, guidance = forward.engine, forward.guidance
    assert guidance is not None, "without guidance one pass does"
    with torch.no_grad(), paused(engine.unwrap(forward.target)):
        for j, host_batch in enumerate(micro_batches):
            forward(engine.to_device(host_batch), j)
            guidance.collect()
    guidance.reduce()
    forward.guide_too = guidance.needs_guide_again  # the Gram layouts have all they need of it


def _task_sum(output: Any, batch: Batch, task: Task, *, learns: bool) -> Tensor:
    """Returns the task loss of a micro-batch, only looked at in a warm-up."""
    with torch.set_grad_enabled(learns):
        return task.loss(output, batch)


def _joined(
    output: Any, *, task: Tensor | None, pull: Tensor | None, guidance: Tensor | None, scale: Tensor, warmup: bool
) -> Tensor:
    """Returns the loss of a micro-batch: task and pull times `scale`, and guidance; in a warm-up that alone."""
    if warmup:
        assert guidance is not None, "a warm-up minimises the guidance loss"
        return _reaching(output, guidance)
    assert task is not None, "only noise has no task loss"
    loss = (task if pull is None else task + pull) * scale.to(task.dtype)
    return loss if guidance is None else loss + guidance


def _sum(values: Sequence[Tensor]) -> Tensor | None:
    """Returns the sum of scalars; None if there are none."""
    return torch.stack(list(values)).sum() if values else None


def _reaching(output: Any, loss: Tensor) -> Tensor:
    """Returns `loss`, whose backward also hands zeros to the model's output.

    DDP and ZeRO wait for the gradient of every parameter, those behind the last guided layer too. Adding
    0 * output.sum() would do, but is NaN where a logit is infinite.
    """
    for tensor in _tensors(output):
        zeros = torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand_as(tensor)
        loss = inject(loss, {"": tensor}, {"": zeros})
    return loss


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yields the tensors of a model's output that carry a gradient."""
    if isinstance(output, Tensor):
        if output.requires_grad:
            yield output
    elif isinstance(output, (Mapping, tuple, list)):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)


def _agree(micro_batches: Sequence[Batch], task: Task, engine: Engine, stop: bool) -> Tensor:
    """Returns [scored terms, ranks asked to stop, unreadable rows] summed over ranks: one all-reduce a step."""
    count = torch.stack([task.count(batch).double() for batch in micro_batches]).sum()
    unreadable = sum(int((batch["weight"] == 0).sum()) for batch in micro_batches if "weight" in batch)
    return engine.sum(torch.tensor([count.item(), float(stop), float(unreadable)], dtype=torch.float64))


def _later(tensor: Tensor) -> Callable[[], list[float]]:
    """Returns a function that gives the values of `tensor`, without waiting for what is queued after this call."""
    if tensor.device.type != "cuda":
        values: list[float] = tensor.tolist()
        return lambda: values
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return list(host.tolist())

    return read


def step_values(log: StepLog, engine: Engine, guidance: Guidance | None) -> dict[str, Any]:
    """Returns what a step says of itself, by its names in metrics.jsonl. Collective.

    task_loss is the mean over scored terms, None where it was not computed (a warm-up on noise); distillation_loss,
    where there is one, is the same mean with its weight. gradient_norm_at_activations is that of guidance's gradient
    at the guided layers; upper_gradient_norm_at_activations that of what else arrives there, from the task and from
    the guidance of later layers, None where it was not watched.
    """
    values: dict[str, Any] = {"task_loss": None}
    if log.task_sum is not None:
        values["task_loss"] = engine.sum(log.task_sum).item() / log.count.item()
    if guidance is not None and log.guidance_loss is not None:
        last = guidance.last
        squares = torch.tensor([last["gradient_square"], *last["watched"]], dtype=torch.float64)
        square, own, above = engine.sum(squares).tolist()
        similarities = [pair["similarity"] for pair in last["pairs"].values()]
        values |= {
            "guidance_loss": log.guidance_loss.item(),
            "similarity": sum(similarities) / len(similarities),
            "pairs": last["pairs"],
            "gradient_norm_at_activations": math.sqrt(square),
            "upper_gradient_norm_at_activations": math.sqrt(square * above / own) if own else None,
            "guidance_seconds": last["seconds"],
            "guidance_bytes": last["bytes"],
        }
    if log.distillation_sum is not None:
        values["distillation_loss"] = engine.sum(log.distillation_sum).item() / log.count.item()
    return values


def make_optimizer(config: OptimizerConfig, target: nn.Module) -> torch.optim.Optimizer:
    """Returns the optimizer over the target's trainable parameters."""
    parameters = [p for p in target.parameters() if p.requires_grad]
    if config.name == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


def count_steps(recipe: Recipe, per_epoch: int) -> int:
    """Returns the number of optimizer steps of a run.

    Raises:
        ValueError: neither or both of training.epochs and training.steps, or not a positive number.
    """
    epochs, steps = recipe.training.epochs, recipe.training.steps
    if (epochs is None) == (steps is None):
        found = "neither is given" if epochs is None else f"epochs={epochs} and steps={steps}"
        raise ValueError(
            f"training.epochs or training.steps: exactly one is needed, but {found}. Set one, null the other."
        )
    num_steps = steps if steps is not None else round((epochs or 0) * per_epoch)
    if num_steps < 1:
        raise ValueError(f"training: epochs={epochs}, steps={steps} makes {num_steps} steps. Give at least one step.")
    return num_steps
