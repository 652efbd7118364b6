"""Which validation samples each of several networks answers correctly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from scale_guide.engine import Engine
from scale_guide.evaluate import Samples
from scale_guide.networks import Network


@torch.no_grad()
def correctness(networks: Mapping[str, Network], samples: Samples, engine: Engine) -> dict[str, Tensor]:
    """Returns network -> booleans [N]: was each sample answered correctly? Collective: call on every rank.

    Every network reads the same samples in one pass, each exactly once over all ranks; unreadable ones are left out.

    Args:
        networks: By the name to give them.
        samples: What they answer; its task's `correct` judges.
        engine: Each of its ranks reads its share.

    Raises:
        ValueError: a task without one answer per sample, or no readable samples.
    """
    task = samples.task
    if not hasattr(task, "correct"):
        raise ValueError(
            f"The task {type(task).__name__} has no answer per sample that is right or wrong. Use one with a label "
            "per sample, such as image_classification or parity, or give yours correct(output, batch) -> bool [B]."
        )
    answers = torch.zeros(len(networks) + 1, len(samples), dtype=torch.float64)
    for positions, batch in samples.batches(engine, "answering"):
        answers[-1, positions] = 1
        for i, network in enumerate(networks.values()):
            answers[i, positions] = task.correct(network.forward(batch["input"]), batch).double().cpu()
    *found, read = engine.sum(answers).cpu() > 0
    if not read.any():
        raise ValueError("No validation sample could be read. Give other data.")
    return {name: vector[read] for name, vector in zip(networks, found, strict=True)}
