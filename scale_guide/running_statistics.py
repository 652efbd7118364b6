"""Running statistics of BatchNorm and its kin, which each rank gathers from its own rows, and each pass anew."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Returns the running means and variances of a bare model, by name: the buffers in which ranks differ."""
    found: dict[str, Tensor | None] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, _NormBase):
            found |= {f"{name}.running_mean": layer.running_mean, f"{name}.running_var": layer.running_var}
    return {name: buffer for name, buffer in found.items() if buffer is not None}


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Returns a function that puts the running statistics of a bare model back to what they are now."""
    layers = [m for m in model.modules() if isinstance(m, _NormBase)]
    buffers = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]

    def restore() -> None:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)

    return restore


@contextlib.contextmanager
def averaged(model: nn.Module, sum_over_ranks: Callable[[Tensor], Tensor], world_size: int) -> Iterator[None]:
    """While inside, the running statistics are their mean over ranks. Collective.

    After it each rank has its own again: neither evaluating nor saving leaves a trace in the training.
    """
    buffers = list(running_statistics(model).values())
    if world_size == 1 or not buffers:
        yield
        return
    own = [buffer.clone() for buffer in buffers]
    means = sum_over_ranks(torch.cat([b.flatten().double() for b in buffers])) / world_size
    for buffer, mean in zip(buffers, torch.split(means, [b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))
    try:
        yield
    finally:
        for buffer, before in zip(buffers, own, strict=True):
            buffer.copy_(before)


@contextlib.contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """While inside, forward passes in training mode use each batch's statistics and update no running ones."""
    layers = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
