"""One guided step over k micro-batches, in the ways whose peak memory bench_memory.py compares.

Ours through the public `Guidance`; GradCache-style caching (Gao et al. 2021: representations of all micro-batches
without grad, the loss on them, their gradients cached, every micro-batch again with its cached gradient); and plain
retention of all k graphs. The last two gather the rows of all ranks by torch's differentiable gather and take CKA by
autograd in the form that suits the setting. All leave the same gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from bench_processes import gather
from similarity_methods import feature_cka, gram_cka
from torch import Tensor, nn

from scale_guide import Guidance
from scale_guide.statistics import Pair

FLOAT_BYTES = 4
GRAM_COPIES = 4
"""Times the size of K and L: they, their gradients, and what lies between."""
OURS: dict[str, dict[str, Any]] = {
    "covariance": {"layout": "covariance", "guide_rows": "recompute"},
    "covariance keeping guide rows": {"layout": "covariance", "guide_rows": "keep"},
    "transpose": {"layout": "transpose"},
    "gather": {"layout": "gather"},
}
"""What each way of ours passes to `Guidance`: the one place for further options."""


@dataclass(frozen=True)
class Setting:
    """Networks and micro-batches: blocks of Linear(width, hidden), ReLU, Linear(hidden, width), the last one guided.

    Attributes:
        name: In the tables.
        rows: Of one micro-batch on one rank.
        width: In and out of a block.
        hidden: Inside a block.
        depth: Blocks.
        guided: Which module of the last block is guided: 0 for the one of `hidden` columns, 2 for the one of `width`.
        covariance: Whether [p, p] matrices are small here, so that everyone may use them; else Gram matrices.
    """

    name: str
    rows: int
    width: int
    hidden: int
    depth: int
    guided: int
    covariance: bool

    @property
    def columns(self) -> int:
        """Columns p = q of the guided layers."""
        return self.width if self.guided == 2 else self.hidden

    @property
    def layer(self) -> str:
        """Name of the guided layer, in both networks."""
        return f"{self.depth - 1}.{self.guided}"

    def network(self, seed: int) -> nn.Sequential:
        """Returns the target (seed 0) or the guide (seed 1)."""
        torch.manual_seed(seed)
        wide, narrow = self.hidden, self.width
        blocks = [
            nn.Sequential(nn.Linear(narrow, wide), nn.ReLU(), nn.Linear(wide, narrow)) for _ in range(self.depth)
        ]
        for block in blocks:
            # With torch's own initialisation a deep stack without skips would give all rows the same output.
            nn.init.kaiming_normal_(block[0].weight)
            nn.init.kaiming_normal_(block[2].weight, nonlinearity="linear")
        return nn.Sequential(*blocks)


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("tokens", rows=128, width=128, hidden=2048, depth=24, guided=2, covariance=True),
        Setting("wide", rows=16, width=256, hidden=16384, depth=2, guided=0, covariance=False),
    )
}


class Step(ABC):
    """One way of doing a guided step; called with k and the rows of a micro-batch, it returns the guidance loss."""

    def __init__(self, setting: Setting, num_micro_batches: int, device: str) -> None:
        self.setting, self.k, self.device = setting, num_micro_batches, device
        self.target, self.guide = setting.network(0).to(device), setting.network(1).to(device).requires_grad_(False)
        self.rank = dist.get_rank()

    @abstractmethod
    def __call__(self, k: int, rows: int) -> Tensor:
        """Leaves the gradient of task and guidance loss on the target's parameters, to be averaged over ranks."""

    def inputs(self, j: int, rows: int) -> Tensor:
        """Returns the rows of micro-batch j [rows, width], made anew, so that they do not grow with k."""
        generator = torch.Generator().manual_seed(1000 * self.rank + j)
        return torch.randn(rows, self.setting.width, generator=generator).to(self.device)


def task_loss(output: Tensor, k: int) -> Tensor:
    """Returns some loss that is a sum over micro-batches; small beside the guidance loss."""
    return 0.01 * output.square().mean() / k


class Ours(Step):
    """By `Guidance`."""

    def __init__(self, setting: Setting, num_micro_batches: int, device: str, options: dict[str, Any]) -> None:
        super().__init__(setting, num_micro_batches, device)
        pairs = [Pair(setting.layer, setting.layer)]
        self.guidance = Guidance(self.target, self.guide, pairs=pairs, num_micro_batches=num_micro_batches, **options)

    def __call__(self, k: int, rows: int) -> Tensor:
        if k > 1:
            with torch.no_grad():
                for j in range(k):
                    self._forward(j, rows, guide_too=True)
                    self.guidance.collect()
            self.guidance.reduce()
        guide_too = k == 1 or self.guidance.needs_guide_again
        total = torch.zeros((), device=self.device)
        for j in range(k):
            output = self._forward(j, rows, guide_too=guide_too)
            part = self.guidance.loss()
            (task_loss(output, k) + part).backward()
            total += part.detach()
        return total

    def _forward(self, j: int, rows: int, *, guide_too: bool) -> Tensor:
        inputs = self.inputs(j, rows)
        with self.guidance.record():
            if guide_too:
                self.guidance.run_guide(inputs)
            return self.target(inputs)  # type: ignore[no-any-return]


class Autograd(Step):
    """What the other two share: hooks that take the guided layers' outputs, and the loss on all rows."""

    def similarity(self, x: list[Tensor], y: list[Tensor]) -> Tensor:
        """Returns CKA over all ranks of rows given by micro-batch. Collective, in backward too."""
        cka = feature_cka if self.setting.covariance else gram_cka
        return cka(gather(torch.cat(x)), gather(torch.cat(y)))

    def rows_of(self, network: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a network's output and the rows of its guided layer."""
        with _caught(network.get_submodule(self.setting.layer)) as outputs:
            return network(inputs), outputs.pop()

    def guide_rows(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return self.rows_of(self.guide, inputs)[1]


class GradCache(Autograd):
    """Representations cached, then gradients of representations."""

    def __call__(self, k: int, rows: int) -> Tensor:
        x, y = [], []
        with torch.no_grad():
            for j in range(k):
                inputs = self.inputs(j, rows)
                y.append(self.guide_rows(inputs))
                x.append(self.rows_of(self.target, inputs)[1])
        for part in x:
            part.requires_grad_()
        loss = 1 - self.similarity(x, y)
        loss.backward()
        cached = [part.grad for part in x]
        del x, y
        for j in range(k):
            output, own = self.rows_of(self.target, self.inputs(j, rows))
            (task_loss(output, k) + (own * cached[j]).sum()).backward()
            cached[j] = None
        return loss.detach()


class Retention(Autograd):
    """All k graphs at once."""

    def __call__(self, k: int, rows: int) -> Tensor:
        x, y = [], []
        task = torch.zeros((), device=self.device)
        for j in range(k):
            inputs = self.inputs(j, rows)
            y.append(self.guide_rows(inputs))
            output, own = self.rows_of(self.target, inputs)
            x.append(own)
            task = task + task_loss(output, k)
        loss = 1 - self.similarity(x, y)
        del x, y
        (task + loss).backward()
        return loss.detach()


@contextmanager
def _caught(module: nn.Module) -> Iterator[list[Tensor]]:
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


METHODS = (*OURS, "GradCache-style", "all graphs kept")


def make_step(method: str, setting: Setting, num_micro_batches: int, device: str) -> Step:
    """Returns the step of a method of METHODS."""
    if method in OURS:
        return Ours(setting, num_micro_batches, device, OURS[method])
    return (GradCache if method == "GradCache-style" else Retention)(setting, num_micro_batches, device)


@dataclass(frozen=True)
class Predicted:
    """Bytes on one rank that grow with k, and a guess at everything.

    Attributes:
        rows: Rows of all micro-batches that are kept, target and guide.
        wire: Further copies of one network's rows while they cross the ranks, or are centred.
        matrices: K and L [N, N].
        worst: An upper guess of the whole step, which decides what is left out.
    """

    rows: int
    wire: int
    matrices: int
    worst: int


def predict(method: str, setting: Setting, k: int, num_processes: int) -> Predicted:
    """Returns what a method should need."""
    local = k * setting.rows
    one_side = FLOAT_BYTES * local * setting.columns
    grams = not method.startswith("covariance") and (method in OURS or not setting.covariance)
    matrices = 2 * FLOAT_BYTES * (local * num_processes) ** 2 if grams else 0
    rows = {"covariance": 0, "covariance keeping guide rows": one_side}.get(method, 2 * one_side)
    # transpose: sent and received; gather: sent, and received from everyone.
    copies = {"transpose": 2, "covariance": 0, "covariance keeping guide rows": 0}.get(method, num_processes + 1)
    activations = FLOAT_BYTES * setting.rows * setting.depth * (2 * setting.hidden + setting.width)
    graphs = activations * (k if method == "all graphs kept" else 1)
    others = 3 if method not in OURS else 1
    squares = 0 if grams else 12 * FLOAT_BYTES * setting.columns**2
    worst = rows + others * copies * one_side + GRAM_COPIES * matrices + squares + graphs
    return Predicted(rows, copies * one_side, matrices, worst)
