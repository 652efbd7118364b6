"""Steps whose loss or gradient is not a number: skipped on all ranks alike, counted, and traced to where it began."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scale_guide.activations import first_tensor
from scale_guide.engine import Engine
from scale_guide.running_statistics import paused
from scale_guide.tasks import Batch

MAX_SAMPLES = 5
"""How many samples a message names."""


class BadNumbersError(ArithmeticError):
    """Too many steps in a row had to be skipped."""


class BadSteps:
    """Counts the skipped steps of a run.

    Attributes:
        told: What was found out about each, a sentence.
        in_a_row: How many since the last good step.
    """

    def __init__(self, limit: int) -> None:
        """Takes the most that may follow each other.

        Raises:
            ValueError: a negative limit.
        """
        if limit < 0:
            raise ValueError(f"training.max_bad_steps={limit} must be 0 or more. Give 0 to end the run at the first.")
        self.limit, self.in_a_row = limit, 0
        self.told: list[str] = []

    @property
    def are_too_many(self) -> bool:
        """Whether the run has to end."""
        return self.in_a_row > self.limit

    def error(self, run_dir: Path, saved: int | None) -> BadNumbersError:
        """Returns the error that ends the run in `run_dir`, whose state was saved after step `saved`."""
        state = "nothing could be saved" if saved is None else f"the state from before them is saved, step {saved}"
        return BadNumbersError(
            f"{run_dir}: {self.in_a_row} steps in a row had no finite gradient, and training.max_bad_steps is "
            f"{self.limit} ({state}). The last, {self.told[-1]}. Look at those samples, lower optimizer.lr, or set "
            "optimizer.clip_norm."
        )

    def add(self, sentence: str) -> None:
        """Counts one more."""
        self.told.append(sentence)
        self.in_a_row += 1


def trace(
    micro_batches: Sequence[Batch],
    forward: Callable[[Batch, int], None],
    networks: dict[str, nn.Module],
    engine: Engine,
) -> str:
    """Returns where the first number went bad, in words: rank, micro-batch, layer and samples. Collective.

    Runs the micro-batches of a skipped step once more, without gradient, and looks at every layer.

    Args:
        micro_batches: As the networks read them, on the host; `index` [b] says which training samples they are.
        forward: Runs both networks on micro-batch j.
        networks: "target" and perhaps "guide", the bare ones.
        engine: Tells the ranks of each other.
    """
    found: list[str] = []
    for j, host_batch in enumerate(micro_batches):
        seen: list[tuple[str, Tensor]] = []
        with contextlib.ExitStack() as watches, torch.no_grad():
            for side, network in networks.items():
                watches.enter_context(_watched(side, network, seen))
            watches.enter_context(paused(networks["target"]))
            batch = engine.to_device(host_batch)
            inputs = [("the data", batch[name]) for name in ("input", "guide_input") if name in batch]
            forward(batch, j)
        bad = next(((what, rows) for what, value in [*inputs, *seen] if (rows := _bad_rows(value)) is not None), None)
        if bad is not None and not found:
            found.append(f"rank {engine.rank}, micro-batch {j}: {bad[0]} {_named(bad[1], host_batch)}")
    everyone = engine.gather_list(found)
    return str(everyone[0]) if everyone else "no layer's output, so the loss or its gradient"


@contextlib.contextmanager
def _watched(side: str, network: nn.Module, seen: list[tuple[str, Tensor]]) -> Iterator[None]:
    """While inside, the outputs of a network's layers with a value that is not a number are added to `seen`."""

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = first_tensor(output)
            if value is not None and _bad_rows(value) is not None:
                seen.append((f"{side} layer {name}", value.detach().clone()))

        return hook

    leaves = {name: module for name, module in network.named_modules() if not list(module.children())}
    handles = [module.register_forward_hook(look(name)) for name, module in leaves.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bad_rows(values: Tensor) -> Tensor | None:
    """Returns which rows (of axis 0) hold NaN or inf; None if none does."""
    if not values.is_floating_point() or values.dim() == 0 or bool(values.isfinite().all()):
        return None
    return (~values.flatten(1).isfinite()).any(dim=1).nonzero().flatten().cpu()


def _named(rows: Tensor, batch: Batch) -> str:
    """Returns "is not finite for samples ..."; rows that are not the batch's go by their own numbers."""
    samples = batch.get("index", torch.arange(len(batch["input"])))
    numbers = samples[rows].tolist() if int(rows.max()) < len(samples) else rows.tolist()
    listed = ", ".join(map(str, numbers[:MAX_SAMPLES]))
    more = f" and {len(numbers) - MAX_SAMPLES} more" if len(numbers) > MAX_SAMPLES else ""
    return f"is not finite for samples {listed}{more}"
