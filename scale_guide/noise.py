"""Noise in place of a batch's input: what the target and the guide read when they are aligned before any data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from scale_guide.config import WarmupInput
from scale_guide.tasks import Batch, Task

_STREAM = 1
"""Keeps the noise of a micro-batch apart from its dropout masks, which are seeded by the same three numbers."""


def check_noise(task: Task) -> None:
    """Checks that noise can stand for the task's input.

    Raises:
        ValueError: the input is whole numbers, and the task does not say of how many.
    """
    inputs = task.collate([task.train[0]])["input"]
    if not inputs.is_floating_point() and "vocab_size" not in task.facts:
        raise ValueError(
            f"guidance.warmup_input: noise for an input of {inputs.dtype} is uniform over a vocabulary, but the facts "
            "of the task have no vocab_size. Give the task that fact, or warm up on the data."
        )


def with_noise(
    micro_batches: Sequence[Batch],
    kind: WarmupInput,
    task: Task,
    *,
    seed: int,
    step: int,
    rank: int,
    world_size: int,
) -> list[Batch]:
    """Returns a rank's micro-batches of a step with noise for `input` [B, ...], everything else as it was.

    Floats: standard normal, or for `released_noise` clamp(1.1 * normal, 0, 1), as the authors released it. Whole
    numbers: uniform over task.facts["vocab_size"]. Where a `mask` [B, T] says padding, padding stays: the sequences
    keep the lengths of the data, for the models, which read lengths off the padding, and for the rows alike.

    The noise follows (seed, step, number of the micro-batch within the global batch) alone: W processes x k
    micro-batches read the same as 1 x (W k).
    """
    changed = []
    for j, batch in enumerate(micro_batches):
        key = [seed % 2**64, step, j * world_size + rank, _STREAM]
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        changed.append(batch | {"input": _draw(batch, kind, task, generator)})
    return changed


def _draw(batch: Batch, kind: WarmupInput, task: Task, generator: torch.Generator) -> Tensor:
    inputs = batch["input"]
    if inputs.is_floating_point():
        noise = torch.randn(inputs.shape, generator=generator).to(inputs.dtype)
        noise = (1.1 * noise).clamp(0, 1) if kind == "released_noise" else noise
    else:
        noise = torch.randint(task.facts["vocab_size"], inputs.shape, generator=generator, dtype=inputs.dtype)
    if "mask" not in batch:
        return noise
    mask = batch["mask"]
    return torch.where(mask.reshape(*mask.shape, *[1] * (inputs.dim() - mask.dim())), noise, inputs)
