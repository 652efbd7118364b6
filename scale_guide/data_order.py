"""Which samples each process reads, in which step: a function of (seed, epoch, step) and of nothing else.

The global batch of a step is the same for every number of processes and micro-batches, and a run that resumes at a
step reads what the unbroken run would have read. Random numbers of a sample follow (seed, epoch, sample).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from scale_guide.statistics import MIN_ROWS
from scale_guide.tasks import Batch, SizedDataset


class TrainOrder(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) keys for one rank: k micro-batches per step, from first_step up to last_step.

    Micro-batch j of a rank is rows [(j W + rank) m, (j W + rank + 1) m) of the step's global batch. An epoch is a
    permutation of the samples, and its last samples, too few for a global batch, are left out.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        first_step: int,
        last_step: int,
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.first_step = first_step
        self.last_step = last_step
        self.steps_per_epoch = steps_per_epoch(num_samples, batch_size)
        _, self.num_micro_batches = batch_sizes(batch_size, micro_batch_size, world_size)

    def __len__(self) -> int:
        return max(0, self.last_step - self.first_step) * self.num_micro_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        known, order = -1, torch.empty(0, dtype=torch.int64)
        rows = self.micro_batch_size
        for step in range(self.first_step, self.last_step):
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            if epoch != known:
                known, order = epoch, self._permutation(epoch)
            batch = order[step_of_epoch * self.batch_size :][: self.batch_size].tolist()
            for j in range(self.num_micro_batches):
                start = (j * self.world_size + self.rank) * rows
                yield [(epoch, index) for index in batch[start : start + rows]]

    def _permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
        return torch.randperm(self.num_samples, generator=generator)


class EvaluationOrder(Sampler[list[tuple[int, float]]]):
    """Batches of (index, weight) keys for one rank: every rank as many, all of the same size.

    Over all ranks each sample comes exactly once with weight 1; the last batches are filled up with repeated samples
    of weight 0.
    """

    def __init__(self, num_samples: int, micro_batch_size: int, *, rank: int, world_size: int) -> None:
        self.num_samples = num_samples
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return -(-self.num_samples // (self.micro_batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[tuple[int, float]]]:
        for batch in range(len(self)):
            start = (batch * self.world_size + self.rank) * self.micro_batch_size
            numbers = range(start, start + self.micro_batch_size)
            yield [(n % self.num_samples, float(n < self.num_samples)) for n in numbers]


class SeededDataset(Dataset[Any]):
    """The training samples by key (epoch, index), their random numbers seeded by (seed, epoch, index)."""

    def __init__(self, samples: SizedDataset, seed: int) -> None:
        self.samples = samples
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            # The CPU generator alone: torch.manual_seed would also seed the GPU's, which nothing here restores, and
            # without loader workers that is the generator of the model's dropout.
            torch.default_generator.manual_seed(_mix(self.seed, epoch, index))
            return self.samples[index]


class WeightedDataset(Dataset[Any]):
    """Validation samples by key (index, weight): pairs (sample, weight), for WeightedCollate."""

    def __init__(self, samples: SizedDataset) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, float]) -> tuple[Any, float]:
        index, weight = key
        return self.samples[index], weight


class WeightedCollate:
    """Collate of pairs (sample, weight): the task's batch, its `weight` [B] multiplied by the pairs' weights."""

    def __init__(self, collate: Callable[[list[Any]], Batch]) -> None:
        self.collate = collate

    def __call__(self, pairs: list[tuple[Any, float]]) -> Batch:
        """Batch of the pairs, in their order."""
        batch = self.collate([sample for sample, _ in pairs])
        return batch | {"weight": batch["weight"] * torch.tensor([weight for _, weight in pairs])}


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Whole global batches in one pass over the training samples.

    Raises:
        ValueError: fewer samples than one batch.
    """
    if num_samples < batch_size:
        raise ValueError(
            f"training.batch_size is {batch_size}, but the task has only {num_samples} training samples: a batch must "
            f"fit into one epoch; set training.batch_size to at most {num_samples}"
        )
    return num_samples // batch_size


def batch_sizes(batch_size: int, micro_batch_size: int | None, world_size: int) -> tuple[int, int]:
    """(rows per process and micro-batch m, micro-batches per step k), with k m world_size = batch_size.

    Without a micro_batch_size k is 1.

    Raises:
        ValueError: too few rows, or a batch that does not divide; it offers the nearest that fit.
    """
    if batch_size < MIN_ROWS:
        raise ValueError(
            f"training.batch_size is {batch_size}: similarity needs at least {MIN_ROWS} rows in the global batch; "
            f"set training.batch_size to {MIN_ROWS} or more"
        )
    if micro_batch_size is not None and micro_batch_size < 1:
        raise ValueError(
            f"training.micro_batch_size is {micro_batch_size}: it must be at least 1; leave it empty for "
            "training.batch_size / processes"
        )
    unit = world_size * (micro_batch_size or 1)
    if batch_size % unit:
        raise ValueError(_indivisible(batch_size, micro_batch_size, world_size))
    rows = micro_batch_size or batch_size // world_size
    return rows, batch_size // (rows * world_size)


def _indivisible(batch_size: int, micro_batch_size: int | None, world_size: int) -> str:
    """Message for a global batch that processes and micro-batches cannot share equally."""
    unit = world_size * (micro_batch_size or 1)
    below, above = batch_size // unit * unit, -(-batch_size // unit) * unit
    fits = " or ".join(str(n) for n in (below, above) if n >= MIN_ROWS)
    text = f"training.batch_size is {batch_size} on {world_size} processes"
    if micro_batch_size is not None:
        text += f" with training.micro_batch_size {micro_batch_size}"
    text += f": it must be a multiple of {unit}; set training.batch_size to {fits}"
    if micro_batch_size is not None and batch_size % world_size == 0:
        per_process = batch_size // world_size
        sizes = [m for m in range(1, per_process + 1) if per_process % m == 0]
        nearest = min(sizes, key=lambda m: (abs(m - micro_batch_size), -m))
        text += f", or training.micro_batch_size to {nearest}"
    return text


def _mix(*numbers: int) -> int:
    """A well mixed 64-bit seed.

    torch's CPU generator takes only the low 32 bits of one, so (seed, epoch, index) cannot simply be packed or added.
    """
    return int(np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(1, np.uint64)[0])
