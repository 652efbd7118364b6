"""Gradients that are not finite, by which no engine may update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def gradients_are_finite(model: nn.Module) -> bool:
    """Returns whether every gradient of a model is a finite number, and their norm too."""
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return bool(torch.isfinite(norm))


def guard_plain_step(model: Any, skipped: Callable[[], None]) -> None:
    """Has a DeepSpeed engine skip such updates under ZeRO-0, as it does by itself under ZeRO-1, -2 and -3.

    Args:
        model: The engine.
        skipped: Called in place of an update.
    """
    update = model.optimizer.step

    def step(*args: Any, **kwargs: Any) -> None:
        if gradients_are_finite(model):
            update(*args, **kwargs)
        else:
            skipped()

    model.optimizer.step = step
