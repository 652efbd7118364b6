"""What check_parity.py compares: three recipes, and the literal float64 training of each in one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scale_guide.build import build_network, build_task
from scale_guide.config import (
    GuidanceConfig,
    GuideConfig,
    OptimizerConfig,
    Recipe,
    TargetConfig,
    TaskConfig,
    TrainingConfig,
)
from scale_guide.data_order import SeededDataset, TrainOrder
from scale_guide.models import deep_fcn
from scale_guide.tasks import Batch, Task

STEPS = 5
BATCH_SIZE = 96  # divisible by 4 processes x 1, 2, 3, 4, 6, 8 micro-batches
# BatchNorm divides by the spread of a micro-batch's rows. With 3 of them (96 rows, 4 processes x 8) it is so badly
# conditioned that rounding alone moves the updates by 2e-8 in float64 and 0.5 in fp32; with 6 by 1e-14 and 8e-6.
COUPLED_BATCH_SIZE = 2 * BATCH_SIZE


def small_conv(*, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """Two convolutions and a linear head: a guide whose flattened maps are wider than the batch is long."""
    channels, height, width = input_shape
    layers = [nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * height * width, num_classes))


def normed_fcn(*, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """A deep FCN with dropout and BatchNorm, whose linear layers have no bias.

    BatchNorm and CKA both take the mean off: the gradient of a bias below them is rounding and nothing else.
    """
    network = deep_fcn.build(num_classes=num_classes, input_shape=input_shape, depth=3, first_width=48, width=32)
    for block in network.hidden:
        block.get_submodule("linear").register_parameter("bias", None)
    return network


def _recipe(
    task: TaskConfig,
    target: TargetConfig,
    guide: GuideConfig,
    guidance: GuidanceConfig,
    *,
    lr: float,
    batch_size: int = BATCH_SIZE,
) -> Recipe:
    ours, theirs = (list(dict.fromkeys(pair[side] for pair in guidance.pairs)) for side in (0, 1))
    return Recipe(
        task=task,
        target=replace(target, layers=ours),
        guide=replace(guide, layers=theirs, dtype="fp32"),
        guidance=guidance,
        optimizer=OptimizerConfig(name="sgd", lr=lr),
        training=TrainingConfig(batch_size=batch_size, steps=STEPS),
    )


IMAGES = TaskConfig("image_classification", {"data": "digits", "image_size": 8})

# All have a guide layer in two pairs, and copy_paste a target layer as well.
RECIPES = {
    # Token-normalised, the number of scored tokens and of rows (tokens) differing from rank to rank.
    "copy_paste": _recipe(
        TaskConfig("copy_paste", {"min_length": 1, "max_length": 5, "num_train": 600, "num_validation": 1}),
        TargetConfig("rnn", {"embedding": 12, "hidden": 16, "layers": 2}),
        GuideConfig("rnn", {"embedding": 12, "hidden": 24, "layers": 2, "cell": "lstm"}),
        GuidanceConfig(
            pairs=[["layers.0", "layers.0"], ["layers.1", "layers.0"], ["layers.1", "layers.1"]], rows="token"
        ),
        lr=0.4,
    ),
    "images": _recipe(
        IMAGES,
        TargetConfig("deep_fcn", {"depth": 3, "first_width": 48, "width": 32, "dropout": 0.0, "batch_norm": False}),
        GuideConfig("parity_cases:small_conv"),
        GuidanceConfig(pairs=[["hidden.0.linear", "0"], ["hidden.1.linear", "2"], ["hidden.2.linear", "2"]]),
        lr=0.1,
    ),
    # Rows that depend on one another: BatchNorm normalises each micro-batch by itself, dropout draws a mask for it.
    "coupled": _recipe(
        IMAGES,
        TargetConfig("parity_cases:normed_fcn"),
        GuideConfig("parity_cases:small_conv"),
        GuidanceConfig(pairs=[["hidden.0.linear", "0"], ["hidden.1.linear", "2"], ["hidden.2.linear", "2"]]),
        lr=0.8,
        batch_size=COUPLED_BATCH_SIZE,
    ),
}
COUPLED = ("coupled",)
"""Recipes whose result depends on how the global batch is cut into micro-batches."""


def step_batches(recipe: Recipe, task: Task, *, rank: int, world_size: int, k: int) -> Iterator[list[Batch]]:
    """Yields the k micro-batches of one rank for each of the steps; all of them together are the global batch."""
    training = recipe.training
    order = TrainOrder(
        len(task.train),
        training.batch_size,
        micro_batch_size=training.batch_size // (world_size * k),
        rank=rank,
        world_size=world_size,
        seed=training.seed,
        first_step=0,
        last_step=STEPS,
    )
    samples = SeededDataset(task.train, training.seed)
    batches = (task.collate([samples[key] for key in keys]) for keys in order)
    for _ in range(STEPS):
        yield [next(batches) for _ in range(k)]


@dataclass
class Reference:
    """A literal training: the loss of each step, and for each tensor where it began and how far it went.

    The tensors are the parameters and the running statistics of BatchNorm, as a mean over ranks.
    """

    losses: list[float]
    initial: dict[str, Tensor]
    updates: dict[str, Tensor]

    def moved(self) -> dict[str, float]:
        """Returns |update| / |initial| of each tensor that does not begin at zero."""
        from_afar = {name: value for name, value in self.initial.items() if value.any()}
        return {name: float(self.updates[name].norm() / value.norm()) for name, value in from_afar.items()}


def train_literally(
    recipe: Recipe, *, processes: int = 1, k: int = 1, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Reference:
    """Returns the training of one process in float64: the whole batch in one graph, and ordinary autograd.

    Of the package it takes the data and the two networks only: hooks, rows, CKA, losses and SGD are written out here.

    Args:
        recipe: One of RECIPES.
        processes: Over which the batch is cut; matters to COUPLED recipes alone.
        k: Micro-batches of each process. All processes * k of them are held in the one graph.
        dtype: In which the compared training draws its dropout masks.
        device: Where it draws them.
    """
    task = build_task(recipe)
    target = build_network("target", recipe, task).double()
    guide = build_network("guide", recipe, task).double().eval().requires_grad_(False)
    for block in target.modules():
        if isinstance(getattr(block, "dropout", None), nn.Dropout):
            block.dropout = _LiteralDropout(block.dropout.p, dtype, device)
    seen: dict[tuple[str, str], Tensor] = {}
    _remember("target", target, seen)
    _remember("guide", guide, seen)
    parameters = dict(target.named_parameters())
    initial = {name: value.detach().double().clone() for name, value in target.state_dict().items()}
    ranks = [{name: buffer.clone() for name, buffer in target.named_buffers()} for _ in range(processes)]
    losses = []
    steps = step_batches(recipe, task, rank=0, world_size=1, k=processes * k)
    for step, batches in enumerate(steps):
        runs = _run_each(batches, target, guide, seen, step=step, seed=recipe.training.seed, ranks=ranks)
        loss = _one_loss(runs, recipe)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        with torch.no_grad():
            for value, gradient in zip(parameters.values(), gradients, strict=True):
                value.sub_(gradient, alpha=recipe.optimizer.lr)
        losses.append(loss.item())
    for name, buffer in target.named_buffers():
        buffer.copy_(torch.stack([rank[name].double() for rank in ranks]).mean(dim=0))
    updates = {name: value.double() - initial[name] for name, value in target.state_dict().items()}
    return Reference(losses, initial, updates)


_Run = tuple[Tensor, int, dict[tuple[str, str], Tensor]]


def _run_each(
    batches: Sequence[Batch],
    target: nn.Module,
    guide: nn.Module,
    seen: dict[tuple[str, str], Tensor],
    *,
    step: int,
    seed: int,
    ranks: Sequence[dict[str, Tensor]],
) -> list[_Run]:
    """Returns each micro-batch's summed task loss, number of scored terms and rows by layer, all in one graph.

    Micro-batch g of the global batch belongs to rank g % W, and every rank counts its own alone in its buffers.
    """
    runs = []
    for g, batch in enumerate(batches):
        own = ranks[g % len(ranks)]
        for name, buffer in own.items():
            # Another tensor: the graph of the micro-batch before needs the one that it changed.
            layer, _, kind = name.rpartition(".")
            setattr(target.get_submodule(layer), kind, buffer.clone())
        torch.manual_seed(int(np.random.SeedSequence([seed, step, g]).generate_state(1)[0]))
        x = batch["input"].double() if batch["input"].is_floating_point() else batch["input"]
        guide(x)
        logits, labels = target(x).flatten(0, -2), batch["target"].flatten()
        own.update(target.named_buffers())
        # The token 0 is not scored in copy-paste, and no image has a class below 0.
        ignored = 0 if "mask" in batch else -1
        loss = nn.functional.cross_entropy(logits, labels, ignore_index=ignored, reduction="sum")
        rows = {layer: _rows(output, batch) for layer, output in seen.items()}
        runs.append((loss, int((labels != ignored).sum()), rows))
    return runs


def _one_loss(runs: Sequence[_Run], recipe: Recipe) -> Tensor:
    """Returns the loss of the global batch: one mean over all scored terms, and CKA over all rows."""
    loss = torch.stack([run_loss for run_loss, _, _ in runs]).sum() / sum(count for _, count, _ in runs)
    pairs = [pair for pair in recipe.guidance.pairs if not isinstance(pair, str)]
    for ours, theirs in pairs:
        x = torch.cat([rows["target", ours] for _, _, rows in runs])
        y = torch.cat([rows["guide", theirs] for _, _, rows in runs])
        loss = loss + 1 - _cka(x, y)
    return loss


class _LiteralDropout(nn.Module):
    """Dropout in float64 by the mask that torch draws for numbers of `dtype` on `device`."""

    def __init__(self, p: float, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.p, self.dtype, self.device = p, dtype, device

    def forward(self, x: Tensor) -> Tensor:
        """Returns x / (1 - p) where the mask keeps it, else 0."""
        kept = nn.functional.dropout(torch.ones(x.shape, dtype=self.dtype, device=self.device), self.p) > 0
        return x * kept.to(x) / (1 - self.p)


def _remember(side: str, model: nn.Module, seen: dict[tuple[str, str], Tensor]) -> None:
    for name, module in model.named_modules():

        def hook(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            seen[side, name] = output[0] if isinstance(output, tuple) else output

        module.register_forward_hook(hook)


def _rows(output: Tensor, batch: Batch) -> Tensor:
    """Returns one row per real token where there is a mask, else one per example."""
    return output[batch["mask"]] if "mask" in batch else output.flatten(1)


def _cka(x: Tensor, y: Tensor) -> Tensor:
    """Returns linear CKA of rows x [n, p] and y [n, q] (Kornblith et al. 2019)."""
    x, y = x - x.mean(0), y - y.mean(0)
    k, ell = x @ x.T, y @ y.T
    return (k * ell).sum() / ((k * k).sum() * (ell * ell).sum()).sqrt()
