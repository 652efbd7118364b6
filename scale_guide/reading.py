"""What the two networks read in a step: the data, noise in its place, or for the guide other rows of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from scale_guide.config import GuideInput, Recipe, WarmupInput
from scale_guide.tasks import Batch, Task

_WARMUP, _OF_GUIDE, _ORDER = 1, 2, 3
"""Streams of draws, apart from each other and from the one without a number: the masks of dropout."""


@dataclass(frozen=True)
class Draws:
    """Seeds of all that is drawn in a step, for this rank.

    They follow (seed, step, number of the micro-batch within the global batch) alone: W processes x k micro-batches
    draw the same as 1 x (W k).
    """

    seed: int
    step: int
    rank: int = 0
    world_size: int = 1

    def seed_of(self, j: int, *stream: int) -> int:
        """Returns the seed of a stream for this rank's micro-batch j, 32 bits."""
        key = [self.seed % 2**64, self.step, j * self.world_size + self.rank, *stream]
        return int(np.random.SeedSequence(key).generate_state(1)[0])

    def generator(self, j: int, *stream: int) -> torch.Generator:
        """Returns a generator, on the host, of that seed."""
        return torch.Generator().manual_seed(self.seed_of(j, *stream))


@dataclass(frozen=True)
class Reading:
    """What both networks read in a step; by default the data.

    Attributes:
        warmup: What a step of the warm-up reads, which minimises the guidance loss alone; None: not such a step.
        noise_for: Who reads it, if it is noise.
        guide_input: What the guide reads beside the target's input.
    """

    warmup: WarmupInput | None = None
    noise_for: Literal["both", "guide"] = "both"
    guide_input: GuideInput = "data"

    @property
    def target_sees_data(self) -> bool:
        """Whether the target's output says anything about the task."""
        return self.warmup in (None, "data") or self.noise_for == "guide"


DATA = Reading()
"""An ordinary step: both networks read the data."""


def check_inputs(recipe: Recipe, task: Task, micro_batch_size: int) -> None:
    """Checks that the guide and the warm-up can read what the recipe says.

    Raises:
        ValueError: noise for an input of whole numbers without a vocabulary; rows to shuffle, but one at a time.
    """
    if not recipe.guidance.needs_guide:
        return
    for field, kind in (("guidance.warmup_input", recipe.guidance.warmup_input), ("guide.input", recipe.guide.input)):
        if kind in ("noise", "released_noise"):
            _check_noise(field, task)
    if recipe.guide.input == "shuffled" and micro_batch_size < 2:
        raise ValueError(
            "guide.input='shuffled' shuffles the rows of a micro-batch, and training.micro_batch_size is 1. Make it "
            "at least 2."
        )


def _check_noise(field: str, task: Task) -> None:
    inputs = task.collate([task.train[0]])["input"]
    if not inputs.is_floating_point() and "vocab_size" not in task.facts:
        raise ValueError(
            f"{field}: noise for an input of {inputs.dtype} is uniform over a vocabulary, but the facts of the task "
            "have no vocab_size. Give the task that fact, or read the data."
        )


def as_read(micro_batches: Sequence[Batch], task: Task, reading: Reading, draws: Draws) -> list[Batch]:
    """Returns a rank's micro-batches of a step as both networks read them.

    `input` is the target's. Where the guide reads something else, that is `guide_input`, of the same shape; where it
    reads other rows of padded sequences, `common_mask` [B, T] says which positions are real in both rows.
    """
    made = list(micro_batches)
    if reading.warmup not in (None, "data"):
        noisy = with_noise(micro_batches, reading.warmup, task, draws)
        made = noisy if reading.noise_for == "both" else _for_guide(made, noisy)
    if reading.guide_input == "noise":
        made = _for_guide(made, with_noise(micro_batches, "noise", task, draws, stream=_OF_GUIDE))
    elif reading.guide_input == "shuffled":
        made = [_shuffled(batch, draws.generator(j, _ORDER)) for j, batch in enumerate(made)]
    return made


def _for_guide(micro_batches: Sequence[Batch], noisy: Sequence[Batch]) -> list[Batch]:
    pairs = zip(micro_batches, noisy, strict=True)
    return [batch | {"guide_input": noise["input"]} for batch, noise in pairs]


def _shuffled(batch: Batch, generator: torch.Generator) -> Batch:
    """Returns the batch with its rows in another order for the guide: one cycle through all that count.

    A row of weight 0 is left in its place, where nobody looks at it.
    """
    inputs = batch.get("guide_input", batch["input"])
    counting = batch["weight"].nonzero().flatten() if "weight" in batch else torch.arange(len(inputs))
    cycle = counting[torch.randperm(len(counting), generator=generator)]
    order = torch.arange(len(inputs))
    order[cycle] = cycle.roll(1)
    changed = batch | {"guide_input": inputs[order]}
    if "mask" in batch:
        changed["common_mask"] = batch["mask"] & batch["mask"][order]
    return changed


def with_noise(
    micro_batches: Sequence[Batch], kind: WarmupInput, task: Task, draws: Draws, *, stream: int = _WARMUP
) -> list[Batch]:
    """Returns a rank's micro-batches of a step with noise for `input` [B, ...], everything else as it was.

    Floats: standard normal, or for `released_noise` clamp(1.1 * normal, 0, 1), as the authors released it. Whole
    numbers: uniform over task.facts["vocab_size"], but for task.facts["padding_id"] if there is one. Where a `mask`
    [B, T] says padding, padding stays: the sequences keep the lengths of the data, for the models, which read lengths
    off the padding, and for the rows alike.
    """
    drawn = (_draw(batch, kind, task, draws.generator(j, stream)) for j, batch in enumerate(micro_batches))
    return [batch | {"input": noise} for batch, noise in zip(micro_batches, drawn, strict=True)]


def _draw(batch: Batch, kind: WarmupInput, task: Task, generator: torch.Generator) -> Tensor:
    inputs = batch["input"]
    if inputs.is_floating_point():
        noise = torch.randn(inputs.shape, generator=generator).to(inputs.dtype)
        noise = (1.1 * noise).clamp(0, 1) if kind == "released_noise" else noise
    else:
        padding = task.facts.get("padding_id")
        num_tokens = task.facts["vocab_size"] - (padding is not None)
        noise = torch.randint(num_tokens, inputs.shape, generator=generator, dtype=inputs.dtype)
        if padding is not None:
            noise += noise >= padding
    if "mask" not in batch:
        return noise
    mask = batch["mask"]
    return torch.where(mask.reshape(*mask.shape, *[1] * (inputs.dim() - mask.dim())), noise, inputs)
