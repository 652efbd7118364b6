"""The norms of the gradients that meet at the guided layers, against literal autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import toy
from torch import Tensor, nn

from scale_guide.engine import Engine
from scale_guide.guidance import Guidance
from scale_guide.trainer import guided_step, step_values


class Target(nn.Module):
    """Two layers and a head; the ReLU between them may write over what the first layer gave."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 7), nn.Linear(7, 6), nn.Linear(6, 5)
        self.relu = nn.ReLU(inplace)

    def above_first(self, first: Tensor) -> Tensor:
        return self.second(self.relu(first.clone()))

    def above_second(self, second: Tensor) -> Tensor:
        return self.head(second.tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.relu(self.first(x))).tanh())


def cka(x: Tensor, y: Tensor) -> Tensor:
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    return (x.T @ y).square().sum() / ((x.T @ x).square().sum() * (y.T @ y).square().sum()).sqrt()


def literal_norms(target: Target, guide: nn.Sequential, batch: dict[str, Tensor], weight: float) -> list[float]:
    """Norms over both layers: of guidance's own gradient, and of what the losses behind a layer send to it."""

    def task(second: Tensor) -> Tensor:
        return nn.functional.cross_entropy(target.above_second(second), batch["target"])

    x = batch["input"]
    theirs = guide[0](x).detach(), guide(x).detach()
    first = target.first(x).detach().requires_grad_()
    second = target.above_first(first).detach().requires_grad_()
    own = [torch.autograd.grad(weight * (1 - cka(a, b)), a)[0] for a, b in zip((first, second), theirs, strict=True)]
    through = target.above_first(first)
    above = [
        torch.autograd.grad(task(through) + weight * (1 - cka(through, theirs[1])), first)[0],
        torch.autograd.grad(task(second), second)[0],
    ]
    return [math.sqrt(sum(float(g.square().sum()) for g in parts)) for parts in (own, above)]


@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("inplace", [False, True])
def test_norms_against_literal_autograd(num_micro_batches: int, inplace: bool) -> None:
    torch.manual_seed(0)
    task, target = toy.build(), Target(inplace=inplace).double()
    guide = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 9)).double()
    whole = task.collate([task.train[i] for i in range(16)])
    whole["input"] = whole["input"].double()
    expected = literal_norms(target, guide, whole, 0.5)
    engine, rows = Engine(), 16 // num_micro_batches
    prepared = engine.prepare(target, torch.optim.SGD(target.parameters(), lr=0.1), micro_batch_size=rows)
    lists: dict[str, Any] = {"target_layers": ["first", "second"], "guide_layers": ["0", "1"]}
    guidance = Guidance(target, guide, num_micro_batches=num_micro_batches, weight=0.5, **lists)
    batches = [{name: value[j : j + rows] for name, value in whole.items()} for j in range(0, 16, rows)]

    def step() -> dict[str, Any]:
        log = guided_step(batches, target=prepared, task=task, engine=engine, guidance=guidance)
        return step_values(log, engine, guidance)

    guidance.watch.is_on = True
    values = step()
    assert values["gradient_norm_at_activations"] == pytest.approx(expected[0], rel=1e-6)
    # The toy task's own loss is in fp32.
    assert values["upper_gradient_norm_at_activations"] == pytest.approx(expected[1], rel=1e-5)
    guidance.watch.is_on = False
    assert step()["upper_gradient_norm_at_activations"] is None
    guidance.close()
