"""One real batch through both networks of a recipe: each pair's CKA, and how many rows it takes to trust it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from scale_guide.analysis.effective_dimension import FLOOR, effective_dimension, rows_needed
from scale_guide.build import build_guide, build_network, check_guide, plan_guidance
from scale_guide.config import Recipe
from scale_guide.data_order import SeededDataset, TrainOrder
from scale_guide.guide import Guide
from scale_guide.layer_map import LayerMap
from scale_guide.layer_rows import LayerReader
from scale_guide.objective import Similarity, companions, not_finite
from scale_guide.statistics import Matrices, Pair, Statistics, Storage, Wires
from scale_guide.tasks import Batch, Task

CHUNK_ROWS = 64
"""Examples that run at a time where the recipe does not say how many fit."""


@dataclass(frozen=True)
class PairFigures:
    """What one batch says of a pair.

    Attributes:
        pair: The two layers.
        num_rows: Rows measured.
        cka: Linear CKA, biased as in the papers.
        debiased: The unbiased estimate.
        floor: Mean CKA over random re-pairings of these rows.
        dimensions: Effective dimensions of target and guide layer: 0 without spread, inf if the rows are too few.
    """

    pair: Pair
    num_rows: int
    cka: float
    debiased: float
    floor: float
    dimensions: tuple[float, float]

    @property
    def is_dead(self) -> bool:
        """Whether one of the layers has no spread."""
        return 0 in self.dimensions

    @property
    def num_needed(self) -> float:
        """Rows for a floor below FLOOR; inf if these rows cannot tell."""
        return rows_needed(*self.dimensions) if math.inf not in self.dimensions else math.inf

    def __str__(self) -> str:
        if self.is_dead:
            dead = " and ".join(side for (side, _), d in zip(self.pair.nodes, self.dimensions, strict=True) if d == 0)
            return (
                f"{self.pair}: no spread in the {dead} layer (all {self.num_rows:,} rows are equal), so the "
                "similarity is 0 and nothing is guided."
            )
        start = (
            f"{self.pair}: CKA {self.cka:.3f} (debiased {self.debiased:.3f}; unrelated rows would give "
            f"{self.floor:.3f}) over {self.num_rows:,} rows"
        )
        if math.inf in self.dimensions:
            return f"{start}; these are too few to tell the effective dimensions: use more rows."
        ours, theirs = (f"{d:.1f}" if d < 100 else f"{d:,.0f}" for d in self.dimensions)
        verdict = "are enough" if self.num_needed <= self.num_rows else "are TOO FEW"
        return (
            f"{start}; effective dimensions {ours} and {theirs}: a floor below {FLOOR:g} needs {self.num_needed:,} "
            f"rows, {self.num_rows:,} {verdict}."
        )


def measure(recipe: Recipe, task: Task, layers: LayerMap) -> list[PairFigures]:
    """Returns the figures of every pair over the first batch of training, of the networks as training begins.

    One process; `training.micro_batch_size` examples run at a time, without gradient, in training mode.

    Raises:
        ValueError: fewer than 4 rows, a guide that leaves its number format, or activations that are not finite.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    guide = build_guide(recipe, task, device)
    check_guide(guide, recipe, task, layers)
    target = build_network("target", recipe, task).to(device).train()
    num_examples = min(recipe.training.batch_size, len(task.train))
    matrices = _statistics(recipe, task, layers, target, guide, num_examples)
    nodes = dict.fromkeys(node for pair in layers.pairs for node in pair.nodes)
    dimensions = {node: effective_dimension(matrices, node) for node in nodes}
    figures = []
    for pair in layers.pairs:
        cka, (debiased, floor, *_) = Similarity("cka").of(matrices, pair), companions(matrices, pair)
        if not cka.isfinite():
            raise not_finite(pair)
        x, y = (dimensions[node] for node in pair.nodes)
        figures.append(PairFigures(pair, matrices.num_rows, float(cka), float(debiased), float(floor), (x, y)))
    return figures


def summary(figures: Sequence[PairFigures]) -> str:
    """Returns one line over all pairs: how many have rows enough, and which one is the neediest."""
    alive = [figure for figure in figures if not figure.is_dead]
    enough = sum(figure.num_needed <= figure.num_rows for figure in alive)
    text = f"{enough} of {len(figures)} pairs have rows enough"
    if len(alive) < len(figures):
        text += f" ({len(figures) - len(alive)} with a layer without spread)"
    if not alive:
        return f"{text}."
    worst = max(alive, key=lambda figure: figure.num_needed)
    if worst.num_needed == math.inf:
        return f"{text}; {worst.pair} needs more than these can tell: raise training.batch_size and measure again."
    text += f"; the neediest, {worst.pair}, needs {worst.num_needed:,}"
    if worst.num_needed <= worst.num_rows:
        return f"{text}."
    times = worst.num_needed / worst.num_rows
    return f"{text}, {times:.1f} times this batch: raise training.batch_size, or use debiased_cka, whose floor is 0."


def _statistics(
    recipe: Recipe, task: Task, layers: LayerMap, target: nn.Module, guide: Guide, num_examples: int
) -> Matrices:
    """Returns the matrices of all examples together, having run them chunk by chunk."""
    cka, device = Similarity("cka"), next(target.parameters()).device
    config = replace(recipe.guidance, similarity=cka.name, layout="auto", accumulation="exact")
    whole = replace(recipe, guidance=config, training=replace(recipe.training, batch_size=num_examples))
    plan = plan_guidance(whole, layers, task, num_processes=1)
    statistics = Statistics(plan, Wires(None), storage=Storage(on_host=True))
    read: dict[str, Any] = {"how": config.rows, "similarity": cka}
    ours = LayerReader("target", target, recipe.target.layers, overwritten=layers.overwritten[0], **read)
    theirs = LayerReader("guide", guide.model, recipe.guide.layers, overwritten=layers.overwritten[1], **read)
    ours.recorder.keep = {pair.target for pair in layers.pairs}
    theirs.recorder.keep = {pair.guide for pair in layers.pairs}
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(recipe.training.seed)
        for host_batch in _chunks(recipe, task, num_examples):
            batch = {name: value.to(device) for name, value in host_batch.items()}
            weights, mask = batch.get("weight"), batch.get("mask")
            with theirs.recorder.record():
                guide(batch["input"])
            y = theirs.take(weights=weights, mask=mask)
            y.rows = {name: rows.to(device) for name, rows in y.rows.items()}
            statistics.add_guide(y.rows, y.weights, padding=y.padding)
            with ours.recorder.record():
                target(batch["input"])
            x = ours.take(weights=weights, mask=mask)
            statistics.add_target(x.rows, y.rows, x.weights, padding=x.padding)
    return statistics.reduce()


def _chunks(recipe: Recipe, task: Task, num_examples: int) -> Iterator[Batch]:
    """Yields the first batch of training in pieces of nearly equal size, for BatchNorm cannot run on a last one."""
    order = TrainOrder(
        len(task.train),
        num_examples,
        micro_batch_size=num_examples,
        rank=0,
        world_size=1,
        seed=recipe.training.seed,
        first_step=0,
        last_step=1,
    )
    keys = next(iter(order))
    samples = SeededDataset(task.train, recipe.training.seed)
    num_chunks = math.ceil(num_examples / (recipe.training.micro_batch_size or CHUNK_ROWS))
    for i in tqdm(range(num_chunks), desc="measuring", leave=False, disable=None):
        start, stop = num_examples * i // num_chunks, num_examples * (i + 1) // num_chunks
        yield task.collate([samples[key] for key in keys[start:stop]])
