"""What check_parity.py compares: two recipes, and the literal float64 training of each in one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

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
from scale_guide.tasks import Batch, Task

STEPS = 5
BATCH_SIZE = 96  # divisible by 4 processes x 1, 2, 3, 4, 6, 8 micro-batches


def small_conv(*, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """Two convolutions and a linear head: a guide whose flattened maps are wider than the batch is long."""
    channels, height, width = input_shape
    layers = [nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * height * width, num_classes))


def _recipe(task: TaskConfig, target: TargetConfig, guide: GuideConfig, guidance: GuidanceConfig, lr: float) -> Recipe:
    ours, theirs = (list(dict.fromkeys(pair[side] for pair in guidance.pairs)) for side in (0, 1))
    return Recipe(
        task=task,
        target=replace(target, layers=ours),
        guide=replace(guide, layers=theirs, dtype="fp32"),
        guidance=guidance,
        optimizer=OptimizerConfig(name="sgd", lr=lr),
        training=TrainingConfig(batch_size=BATCH_SIZE, steps=STEPS),
    )


# Both have a guide layer in two pairs, and copy_paste a target layer as well.
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
        TaskConfig("image_classification", {"data": "digits", "image_size": 8}),
        TargetConfig("deep_fcn", {"depth": 3, "first_width": 48, "width": 32, "dropout": 0.0, "batch_norm": False}),
        GuideConfig("parity_cases:small_conv"),
        GuidanceConfig(pairs=[["hidden.0.linear", "0"], ["hidden.1.linear", "2"], ["hidden.2.linear", "2"]]),
        lr=0.1,
    ),
}


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
    """A literal training: the loss of each step, and for each parameter where it began and how far it went."""

    losses: list[float]
    initial: dict[str, Tensor]
    updates: dict[str, Tensor]

    def moved(self) -> dict[str, float]:
        """Returns |update| / |initial| of each parameter."""
        return {name: float(update.norm() / self.initial[name].norm()) for name, update in self.updates.items()}


def train_literally(recipe: Recipe) -> Reference:
    """Returns the training of one process in float64: the whole batch in one graph, and ordinary autograd.

    Of the package it takes the data and the two networks only: hooks, rows, CKA, losses and SGD are written out here.
    """
    task = build_task(recipe)
    target = build_network("target", recipe, task).double()
    guide = build_network("guide", recipe, task).double().eval().requires_grad_(False)
    seen: dict[tuple[str, str], Tensor] = {}
    _remember("target", target, seen)
    _remember("guide", guide, seen)
    parameters = dict(target.named_parameters())
    initial = {name: value.detach().clone() for name, value in parameters.items()}
    pairs = [pair for pair in recipe.guidance.pairs if not isinstance(pair, str)]
    losses = []
    for (batch,) in step_batches(recipe, task, rank=0, world_size=1, k=1):
        x = batch["input"].double() if batch["input"].is_floating_point() else batch["input"]
        guide(x)
        logits = target(x)
        # The token 0 is not scored in copy-paste, and no image has a class below 0.
        ignored = 0 if "mask" in batch else -1
        loss = nn.functional.cross_entropy(logits.flatten(0, -2), batch["target"].flatten(), ignore_index=ignored)
        for ours, theirs in pairs:
            loss += 1 - _cka(_rows(seen["target", ours], batch), _rows(seen["guide", theirs], batch))
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        with torch.no_grad():
            for value, gradient in zip(parameters.values(), gradients, strict=True):
                value.sub_(gradient, alpha=recipe.optimizer.lr)
        losses.append(loss.item())
    updates = {name: value.detach() - initial[name] for name, value in parameters.items()}
    return Reference(losses, initial, updates)


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
