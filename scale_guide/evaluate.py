"""The validation set over ranks: scores of the target over all of it, and samples of it for analyses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from scale_guide.data_order import EvaluationOrder, WeightedCollate, WeightedDataset
from scale_guide.engine import Engine
from scale_guide.tasks import Batch, Task
from scale_guide.tracking import quiet_worker


def evaluate(
    target: nn.Module, task: Task, engine: Engine, *, micro_batch_size: int, num_workers: int = 0
) -> dict[str, float]:
    """Returns the task's scores, e.g. {"loss": ..., "accuracy": ...}; the same on every rank. Collective.

    Every rank runs equally many forward passes (ZeRO-3 gathers weights in each); what fills the last ones up has
    weight 0.

    Args:
        target: The prepared network.
        task: Holds the validation samples, the scores and how they add up.
        engine: Sums over ranks.
        micro_batch_size: Rows per process and forward pass.
        num_workers: Data-loading processes per rank.
    """
    order = EvaluationOrder(len(task.validation), micro_batch_size, rank=engine.rank, world_size=engine.world_size)
    loader = DataLoader(
        WeightedDataset(task.validation),
        batch_sampler=order,
        collate_fn=WeightedCollate(task.collate),
        num_workers=num_workers,
        worker_init_fn=quiet_worker,
        pin_memory=engine.device.type == "cuda",
    )
    was_training = target.training
    target.eval()
    sums: dict[str, torch.Tensor] = {}
    with torch.no_grad(), engine.averaged_buffers(target):
        for host_batch in loader:
            batch = engine.to_device(host_batch)
            scores = task.scores(engine.forward(target, batch["input"]), batch)
            sums = {name: sums[name] + value if sums else value for name, value in scores.items()}
    target.train(was_training)
    names = sorted(sums)
    totals = engine.sum(torch.stack([sums[name].double() for name in names])).tolist()
    return task.summarize(dict(zip(names, totals, strict=True)))


@dataclass(frozen=True)
class Samples:
    """Random samples of a task's validation set, drawn with a fixed seed: the same on any number of processes.

    Attributes:
        task: Holds them.
        num_rows: How many; 0 or more than there are: all.
        batch_size: How many run at a time, at most.
        num_workers: Data-loading processes per rank.

    Raises:
        ValueError: fewer than none, or batches of none.
    """

    task: Task
    num_rows: int = 0
    batch_size: int = 64
    num_workers: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (("rows", self.num_rows, 0), ("batch_size", self.batch_size, 1)):
            if value < least:
                raise ValueError(f"--{name}={value} must be at least {least}. Give more.")

    def __len__(self) -> int:
        available = len(self.task.validation)
        return min(self.num_rows or available, available)

    def batches(self, engine: Engine, label: str) -> Iterator[tuple[Tensor, Batch]]:
        """Yields this rank's share: positions of samples [b], counted from 0, and their batch on the device.

        The batches are nearly equal in size and the same on any number of processes. Of W ranks one has the batches
        rank, rank + W, ..., so that some may have one more. Unreadable samples (weight 0) are left out.

        Args:
            engine: Says which rank this is and where it computes.
            label: Name of the work on the progress bar.
        """
        drawn = torch.randperm(len(self.task.validation), generator=torch.Generator().manual_seed(0))
        num_batches = math.ceil(len(self) / self.batch_size)
        parts = torch.arange(len(self)).tensor_split(num_batches)[engine.rank :: engine.world_size]
        loader = DataLoader(
            cast("Dataset[Any]", self.task.validation),
            batch_sampler=[drawn[part].tolist() for part in parts],
            collate_fn=self.task.collate,
            num_workers=self.num_workers,
            worker_init_fn=quiet_worker,
            pin_memory=engine.device.type == "cuda",
        )
        hidden = None if engine.is_main else True  # None: a terminal alone sees it
        for part, batch in zip(parts, tqdm(loader, desc=label, leave=False, disable=hidden), strict=True):
            readable = batch["weight"] > 0
            if readable.any():
                yield part[readable], engine.to_device({name: value[readable] for name, value in batch.items()})
