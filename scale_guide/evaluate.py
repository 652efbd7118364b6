"""Scores of the target over the whole validation set: every sample counted once, on any number of processes."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader

from scale_guide.data_order import EvaluationOrder, WeightedCollate, WeightedDataset
from scale_guide.engine import Engine
from scale_guide.tasks import Task
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
    engine.average_buffers(target)
    was_training = target.training
    target.eval()
    sums: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for host_batch in loader:
            batch = engine.to_device(host_batch)
            scores = task.scores(engine.forward(target, batch["input"]), batch)
            sums = {name: sums[name] + value if sums else value for name, value in scores.items()}
    target.train(was_training)
    names = sorted(sums)
    totals = engine.sum(torch.stack([sums[name].double() for name in names])).tolist()
    return task.summarize(dict(zip(names, totals, strict=True)))
