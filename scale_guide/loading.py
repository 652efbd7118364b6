"""The training data of one rank as steps of micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from scale_guide.data_order import SeededDataset, TrainOrder
from scale_guide.engine import Engine
from scale_guide.tasks import Batch, Task
from scale_guide.tracking import quiet_worker


def training_steps(task: Task, order: TrainOrder, *, num_workers: int, pin_memory: bool) -> Iterator[list[Batch]]:
    """Yields the k micro-batches of every step of `order`, on the host; one loader for the whole training.

    Each batch has an extra `index` [B]: which samples its rows are.
    """
    loader = iter(
        DataLoader(
            _Indexed(SeededDataset(task.train, order.seed)),
            batch_sampler=order,
            collate_fn=_IndexedCollate(task.collate),
            num_workers=num_workers,
            worker_init_fn=quiet_worker,
            pin_memory=pin_memory,
        )
    )
    for _ in range(order.first_step, order.last_step):
        yield list(islice(loader, order.num_micro_batches))


class Unreadable:
    """The training samples that this rank could not read."""

    def __init__(self) -> None:
        self._indices: set[int] = set()
        self._told = False

    def note(self, batch: Batch) -> None:
        """Remembers the rows of weight 0 of a batch of `training_steps`."""
        self._indices.update(batch["index"][batch["weight"] == 0].tolist())

    def tell_once(self, num_rows: float, say: Callable[[str], None]) -> None:
        """Says that there are such samples, the first time that a step has any on any rank."""
        if num_rows and not self._told:
            say("some samples are unreadable: they have no part in training; summary.json will list them")
            self._told = True

    def names(self, task: Task, engine: Engine) -> list[str]:
        """Returns those of all ranks, by file name where the task has one. Collective: call on every rank."""
        name = getattr(task, "sample_name", str)
        return [str(name(index)) for index in sorted(set(engine.gather_list(sorted(self._indices))))]


class _Indexed(Dataset[Any]):
    """(index, sample) by key, so that a row with weight 0 can be named."""

    def __init__(self, samples: SeededDataset) -> None:
        self.samples = samples

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Any]:
        return key[1], self.samples[key]


class _IndexedCollate:
    """Collate of (index, sample): the task's batch and `index` [B]."""

    def __init__(self, collate: Callable[[list[Any]], Batch]) -> None:
        self.collate = collate

    def __call__(self, pairs: list[tuple[int, Any]]) -> Batch:
        return self.collate([sample for _, sample in pairs]) | {"index": torch.tensor([i for i, _ in pairs])}
