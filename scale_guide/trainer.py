"""The optimizer step: k micro-batches on W processes that equal one graph over the global batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from scale_guide.config import OptimizerConfig, Recipe
from scale_guide.engine import Engine
from scale_guide.guidance import Guidance
from scale_guide.tasks import Batch, Task


@dataclass
class StepLog:
    """What one optimizer step leaves: tensors on the device, read only when a line is logged."""

    task_sum: Tensor
    """Sum of the task loss over this rank's scored terms, scalar."""
    count: Tensor
    """Scored terms of the global batch, scalar."""
    guidance_loss: Tensor | None
    """Weighted sum of 1 - similarity over the pairs, scalar; None without a guide."""
    agreed: Callable[[], list[float]]
    """Sums over ranks of [scored terms, ranks asked to stop, unreadable rows]."""


def guided_step(
    micro_batches: Sequence[Batch],
    *,
    target: nn.Module,
    task: Task,
    engine: Engine,
    guidance: Guidance | None = None,
    accumulation: str = "exact",
    seed: int = 0,
    step: int = 0,
    stop: bool = False,
) -> StepLog:
    """Returns the losses of one optimizer step, having done it. Collective.

    Every micro-batch's loss is W * (its task sum) / (global count) + guidance, so that after the engine's mean over
    the W ranks the gradient is that of one graph over the global batch. With several micro-batches the guidance needs
    two passes: the first, without gradients, gathers the statistics of all of them.

    Args:
        micro_batches: This rank's k micro-batches, on the host.
        target: The prepared network.
        task: Gives sums and counts.
        engine: The target's engine.
        guidance: Registered on the unwrapped target; None trains the target alone.
        accumulation: exact, or per_micro_batch: the mean over micro-batches of each one's own guidance loss.
        seed: Of dropout.
        step: Index of this step, for dropout.
        stop: Whether this rank was asked to stop; all ranks learn of it through `agreed`.
    """
    k = len(micro_batches)
    totals = _agree(micro_batches, task, engine, stop)
    agreed = _later(totals)
    count = totals[0].clamp_min(1)
    two_passes = guidance is not None and k > 1 and accumulation == "exact"
    if guidance is not None and two_passes:
        with torch.no_grad(), batch_norm_paused(engine.unwrap(target)):
            for j, host_batch in enumerate(micro_batches):
                _forward(engine.to_device(host_batch), target, engine, guidance, (seed, step, j))
                guidance.collect()
        guidance.reduce()
    # The Gram layouts have all they need of the guide after the first pass.
    guide_too = not two_passes or (guidance is not None and guidance.needs_guide_again)
    task_sum = torch.zeros((), device=engine.device, dtype=count.dtype)
    guidance_sum = torch.zeros_like(task_sum) if guidance is not None else None
    for j, host_batch in enumerate(micro_batches):
        batch = engine.to_device(host_batch)
        with engine.micro_batch(last=j == k - 1):
            output = _forward(batch, target, engine, guidance, (seed, step, j), guide_too=guide_too)
            task_part = task.loss(output, batch)
            loss = task_part * (engine.world_size / count).to(task_part.dtype)
            if guidance is not None and guidance_sum is not None:
                part = guidance.loss() if two_passes or k == 1 else guidance.loss() / k
                guidance_sum = guidance_sum + part.detach()
                loss = loss + part
            engine.backward(loss)
        task_sum = task_sum + task_part.detach()
    engine.step()
    return StepLog(task_sum, count, guidance_sum, agreed)


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


def _forward(
    batch: Batch,
    target: nn.Module,
    engine: Engine,
    guidance: Guidance | None,
    key: tuple[int, int, int],
    *,
    guide_too: bool = True,
) -> Any:
    """Returns the target's output, the guide having run first; both passes over a micro-batch draw the same masks."""
    seed, step, j = key
    # By the number of the micro-batch within the global batch: the same masks for W x k as for 1 x (W k).
    state = np.random.SeedSequence([seed % 2**64, step, j * engine.world_size + engine.rank]).generate_state(1)
    torch.manual_seed(int(state[0]))
    if guidance is None:
        return engine.forward(target, batch["input"])
    with guidance.record(weights=batch.get("weight"), mask=batch.get("mask")):
        if guide_too:
            guidance.run_guide(batch["input"])
        return engine.forward(target, batch["input"])


def learning_rate(config: OptimizerConfig, step: int, *, num_steps: int, steps_per_epoch: int) -> float:
    """Returns the learning rate of step `step` (0 .. num_steps - 1): a function of the step alone."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "step":
        return config.lr * float(config.gamma ** (step // (config.step_epochs * steps_per_epoch)))
    return config.lr


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


@contextlib.contextmanager
def batch_norm_paused(model: nn.Module) -> Iterator[None]:
    """While inside, forward passes in training mode use each batch's statistics and update no running ones."""
    layers = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
