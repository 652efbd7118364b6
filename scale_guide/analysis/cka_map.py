"""CKA between all layers of several networks, from one pass over the data ("minibatch CKA", Nguyen et al. 2020).

HSIC_1 of a minibatch (Song et al. 2012, eq. 5) is unbiased, so that sums over minibatches and ranks estimate that of
all rows, and memory does not grow with them. With K~, L~ the Gram matrices [m, m] without their diagonals,

    m (m - 3) HSIC_1 = <K~, L~> + sum(K~) sum(L~) / ((m - 1) (m - 2)) - 2 <K~ 1, L~ 1> / (m - 2)

so each layer's Gram matrix is made once, and three matrix products over the stack of all give every pair.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass

import torch
from torch import Tensor

from scale_guide.activations import Recorder
from scale_guide.analysis.intrinsic_dimension import MAX_POINTS, Points
from scale_guide.engine import Engine
from scale_guide.evaluate import Samples
from scale_guide.layer_map import candidates, guidable
from scale_guide.networks import Network
from scale_guide.rows import Selected, select
from scale_guide.statistics import MIN_ROWS
from scale_guide.statistics.gram import gram_of
from scale_guide.tasks import Batch, Task


def hsic(grams: Tensor) -> Tensor:
    """Returns m HSIC_1 of every pair of layers [L, L], float64, from Gram matrices [L, m, m] of m rows, m > 3."""
    m = grams.shape[1]
    hollow = grams.double()
    hollow = hollow - hollow.diagonal(dim1=1, dim2=2).diag_embed()
    flat, sums = hollow.flatten(1), hollow.sum(dim=2)
    totals = sums.sum(dim=1)
    pairs = flat @ flat.T + torch.outer(totals, totals) / ((m - 1) * (m - 2)) - 2 / (m - 2) * sums @ sums.T
    return pairs / (m - 3)


def cka(sums: Tensor) -> Tensor:
    """Returns CKA [L, L] from sums of HSIC_1 [L, L]; 0 where a layer's own is not positive: no spread, or noise."""
    scale = sums.diagonal().clamp_min(0).sqrt()
    scales = torch.outer(scale, scale)
    return torch.where(scales > 0, sums / torch.where(scales > 0, scales, 1), 0)


@dataclass(frozen=True)
class Comparison:
    """What one pass over the data says of several networks.

    Attributes:
        layers: Network -> names of its layers, in execution order.
        values: CKA of all layers of all networks, one network after the other [L, L], float64.
        num_rows: Samples that counted.
        dimensions: Network -> intrinsic dimension of each layer; NaN where it has no spread.
        num_points: Samples that the intrinsic dimensions are estimated from.
    """

    layers: dict[str, list[str]]
    values: Tensor
    num_rows: int
    dimensions: dict[str, list[float]]
    num_points: int

    def between(self, first: str, second: str) -> list[list[float]]:
        """Returns CKA of each layer of one network (rows) with each of another, or of the same (columns)."""
        found: list[list[float]] = self.values[self._span(first), self._span(second)].tolist()
        return found

    def _span(self, network: str) -> slice:
        names = list(self.layers)
        start = sum(len(self.layers[name]) for name in names[: names.index(network)])
        return slice(start, start + len(self.layers[network]))


@torch.no_grad()
def compare(
    networks: Mapping[str, Network], samples: Samples, engine: Engine, *, max_points: int = MAX_POINTS
) -> Comparison:
    """Returns CKA between all layers of all networks over samples. Collective: call on every rank.

    One row is a whole example, flattened; padding has its column's mean. The result is the same on any number of
    processes.

    Args:
        networks: By the name to give them.
        samples: What they read, in minibatches; a minibatch of fewer than 4 readable ones is left out.
        engine: Each of its ranks reads its share; sums are added over ranks.
        max_points: Samples to estimate intrinsic dimensions from; fewer if the layers are wide. 0: no dimensions.

    Raises:
        ValueError: too few samples, a network that cannot read them, unknown layers, or activations that are not
            finite.
    """
    _check_sizes(samples)
    with ExitStack() as stack:
        readers = {
            name: stack.enter_context(closing(_Reader(name, network, samples.task, engine)))
            for name, network in networks.items()
        }
        width = sum(sum(reader.widths.values()) for reader in readers.values())
        points = Points.within_memory(min(len(samples), max_points), width)
        sums, (num_rows, num_points) = _read_all(readers, samples, engine, points)
    layers = {name: list(reader.widths) for name, reader in readers.items()}
    _check_sums(layers, sums, num_rows)
    dimensions = {name: [points.dimension(name, layer, engine) for layer in found] for name, found in layers.items()}
    return Comparison(layers, cka(sums).cpu(), num_rows, dimensions, num_points)


def _read_all(
    readers: Mapping[str, _Reader], samples: Samples, engine: Engine, points: Points
) -> tuple[Tensor, list[int]]:
    """Returns summed HSIC_1 of all layers [L, L], and how many samples are in it and in `points`. Collective."""
    num_layers = sum(len(reader.widths) for reader in readers.values())
    sums = torch.zeros(num_layers, num_layers, dtype=torch.float64, device=engine.device)
    counted = torch.zeros(2, dtype=torch.float64)
    for positions, batch in samples.batches(engine, "comparing layers"):
        if len(positions) < MIN_ROWS:
            continue
        grams: list[Tensor] = []
        for name, reader in readers.items():
            read = reader.read(batch)
            grams += [gram_of(chosen.rows, chosen.mask).to(engine.device) for chosen in read.values()]
            points.keep(name, read, positions)
        sums += hsic(torch.stack(grams))
        counted += torch.tensor([len(positions), int((positions < points.num_points).sum())])
    return engine.sum(sums), [int(count) for count in engine.sum(counted)]


class _Reader:
    """Reads the rows of a network's layers; two samples have shown which they are, and how wide.

    Attributes:
        widths: Layer -> columns of its rows, in execution order.
    """

    def __init__(self, name: str, network: Network, task: Task, engine: Engine) -> None:
        self._network = network
        self._recorder = Recorder(network.module, candidates(network.module, network.layers))
        batch = engine.to_device(task.collate([task.validation[0]] * 2))
        rows = self._first(name, batch)
        if not rows:
            raise ValueError(f"{name} has no layers to compare beside its output. Name some: --layers NAME,GLOB,...")
        self.widths = {layer: chosen.rows.shape[1] for layer, chosen in rows.items()}

    def _first(self, name: str, batch: Batch) -> dict[str, Selected]:
        # Convolutions are quicker with their channels last, if nothing between them asks for the other order.
        for order in (torch.channels_last, torch.contiguous_format):
            self._network.module.to(memory_format=order)
            try:
                return self.read(batch)
            except (IndexError, RuntimeError, TypeError) as error:
                problem = error
        shape = "x".join(map(str, batch["input"].shape[1:]))
        raise ValueError(
            f"{name} cannot read the samples of this task, of shape {shape} ({type(problem).__name__}: "
            f"{' '.join(str(problem).split())[:200]}). Give a network for them, or other task.options."
        ) from problem

    def close(self) -> None:
        """Takes the hooks off."""
        self._recorder.close()

    def read(self, batch: Batch) -> dict[str, Selected]:
        """Returns the rows of every layer of one batch, and which positions of sequences are real."""
        with self._recorder.record():
            self._network.forward(batch["input"])
        fired = self._recorder.take()
        chosen = {}
        for layer in guidable(fired, self._network.layers):
            output, channels_first = fired[layer].output, fired[layer].channels_first
            if output.is_contiguous(memory_format=torch.channels_last):
                output = output.movedim(1, -1)  # the order of columns means nothing, and this one needs no copy
            chosen[layer] = select(output, "flatten", mask=batch.get("mask"), channels_first=channels_first)
        return chosen


def _check_sizes(samples: Samples) -> None:
    # Of nearly equal minibatches none is then below MIN_ROWS.
    for name, value, least in (("rows", len(samples), MIN_ROWS), ("batch_size", samples.batch_size, 2 * MIN_ROWS)):
        if value < least:
            raise ValueError(f"--{name}: {value} samples are too few to estimate HSIC_1. Give at least {least}.")


def _check_sums(layers: Mapping[str, list[str]], sums: Tensor, num_rows: int) -> None:
    if not num_rows:
        raise ValueError(f"No minibatch holds {MIN_ROWS} readable samples. Give other data, or more --rows.")
    names = [(network, layer) for network, found in layers.items() for layer in found]
    for (network, layer), own in zip(names, sums.diagonal().tolist(), strict=True):
        if not math.isfinite(own):
            raise ValueError(
                f"{network}: the activations of layer {layer!r} hold inf or NaN, or numbers whose squares leave fp32. "
                "Compare other layers (--layers), or another checkpoint."
            )
