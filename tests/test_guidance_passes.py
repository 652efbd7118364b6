"""What the guidance keeps between the passes over micro-batches, and what it lets go of."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from conftest import Pool
from reference import cka
from test_guidance import accumulate, data, networks
from torch import Tensor, nn

from scale_guide import Guidance
from scale_guide.statistics import Storage, Wires


def step(guidance: Guidance, target: nn.Module, x: Tensor) -> Tensor:
    with guidance.record():
        guidance.run_guide(x)
        target(x)
    return guidance.loss()


def dropped_rows(group: Any, *, layout: str) -> list[bool]:
    """For the second and third step, whether every output of the guide's layers is gone when the target starts."""
    target, guide = networks()
    guidance = Guidance(target, guide, guide_layers=["0", "2"], layout=layout, group=group)
    seen: list[weakref.ref[Tensor]] = []
    gone: list[bool] = []
    for name in ("0", "2"):
        dict(guide.named_modules())[name].register_forward_hook(lambda *args: seen.append(weakref.ref(args[2])))
    target.register_forward_pre_hook(lambda *_: gone.append(not any(ref() is not None for ref in seen)))
    for _ in range(3):
        seen.clear()
        step(guidance, target, data()[0])
    return gone[1:]


@pytest.mark.parametrize("world_size", [1, 2])
def test_guide_rows_are_gone_before_the_target_runs(pool: Pool, world_size: int) -> None:
    for layout in ("gather", "transpose"):
        for gone in pool.run(dropped_rows, world_size, layout=layout):
            assert gone == [True, True]
    for gone in pool.run(dropped_rows, world_size, layout="covariance"):
        assert gone == [False, False]


def test_a_plan_drops_them_from_the_first_step_on() -> None:
    target, guide = networks()
    first = Guidance(target, guide, layout="transpose")
    step(first, target, data()[0])
    first.close()
    second = Guidance(target, guide, plan=first.plan, pairs=first.pairs)
    with second.record():
        second.run_guide(data()[0])
        assert not second._now.guide.rows
        target(data()[0])
    torch.testing.assert_close(second.loss(), step_value())


def step_value() -> Tensor:
    target, guide = networks()
    return step(Guidance(target, guide), target, data()[0])


def gradients(group: Any, *, guide_rows: str, layout: str, storage: Storage) -> tuple[float, list[Tensor], int]:
    """Loss and gradient of one step of three micro-batches, and how often the guide ran."""
    target, guide = networks()
    lines, runs = Wires(group), []
    guide.register_forward_hook(lambda *_: runs.append(1))
    x, y = (part.tensor_split(lines.size)[lines.rank] for part in data())
    options: dict[str, Any] = {"guide_rows": guide_rows, "layout": layout, "storage": storage, "group": group}
    guidance = Guidance(target, guide, num_micro_batches=3, **options)
    loss = accumulate(target, guidance, list(zip(x.chunk(3), y.chunk(3), strict=True)), 3)
    return loss, [p.grad for p in target.parameters() if p.grad is not None], len(runs)


@pytest.mark.parametrize("world_size", [1, 2])
def test_kept_and_recomputed_guide_rows_agree(pool: Pool, world_size: int) -> None:
    expected = pool.run(gradients, world_size, guide_rows="recompute", layout="covariance", storage=Storage())
    assert [runs for *_, runs in expected] == [6] * world_size
    for guide_rows, layout, on_host in (
        ("keep", "covariance", False),
        ("keep", "covariance", True),
        ("auto", "covariance", False),
        ("auto", "gather", True),
        ("recompute", "transpose", False),
    ):
        case = {"guide_rows": guide_rows, "layout": layout, "storage": Storage(on_host=on_host)}
        for (loss, ours, runs), (wanted, theirs, _) in zip(
            pool.run(gradients, world_size, **case), expected, strict=True
        ):
            assert runs == 3
            assert loss == pytest.approx(wanted, rel=1e-12)
            for gradient, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-12)


def test_more_micro_batches_than_announced() -> None:
    target, guide = networks()
    guidance = Guidance(target, guide)
    x, y = data()
    with pytest.raises(ValueError, match=r"num_micro_batches=1 in one step. Pass Guidance\(num_micro_batches=k\)"):
        accumulate(target, guidance, list(zip(x.chunk(2), y.chunk(2), strict=True)), 2)


@pytest.mark.parametrize("layout", ["gather", "covariance"])
def test_a_step_that_broke_off_leaves_nothing_behind(layout: str) -> None:
    """An exception between the guide and the loss, such as out of memory: the next step is a whole one."""
    target, guide = networks()
    guidance = Guidance(target, guide, layout=layout)
    step(guidance, target, data()[0])
    with guidance.record():
        guidance.run_guide(data()[0] + 1)
    torch.testing.assert_close(step(guidance, target, data()[0]), step_value())


def test_a_step_that_broke_off_in_its_middle_must_begin_anew() -> None:
    target, guide = networks()
    x, y = data()
    micro_batches = list(zip(x.chunk(3), y.chunk(3), strict=True))
    guidance = Guidance(target, guide, num_micro_batches=3)
    expected = accumulate(target, guidance, micro_batches, 3)
    with torch.no_grad():
        with guidance.record():
            guidance.run_guide(x[:8])
            target(x[:8])
        guidance.collect()
        with guidance.record():
            guidance.run_guide(x[:8])
        with pytest.raises(ValueError, match=r"broke off .* Call guidance.reset\(\)"), guidance.record():
            pass
    guidance.reset()
    assert accumulate(target, guidance, micro_batches, 3) == pytest.approx(expected, rel=1e-12)


class Sequences(nn.Module):
    """[B, T] tokens -> [B, T, 5] of two layers, position by position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, width)
        self.first, self.head = nn.Linear(width, width), nn.Linear(width, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.first(self.embedding(tokens)).tanh())


@pytest.mark.parametrize("layout", ["auto", "gather", "transpose"])
def test_flattened_sequences_leave_their_padding_out(layout: str) -> None:
    torch.manual_seed(0)
    target, guide = Sequences(6).double(), Sequences(9).double()
    tokens = torch.randint(7, (12, 4))
    mask = torch.arange(4) < (torch.arange(12) % 4 + 1)[:, None]
    guidance = Guidance(target, guide, layout=layout, num_micro_batches=3)
    losses = []
    for training in (False, True):
        for part, real in zip(tokens.chunk(3), mask.chunk(3), strict=True):
            with torch.set_grad_enabled(training), guidance.record(mask=real):
                if not training or guidance.needs_guide_again:
                    guidance.run_guide(part)
                target(part)
            if training:
                loss = guidance.loss()
                loss.backward()
                losses.append(loss.detach())
            else:
                guidance.collect()
        if not training:
            guidance.reduce()
    assert guidance.plan is not None
    assert not guidance.plan.pairs("covariance")
    x, y = target.first(target.embedding(tokens)), guide.first(guide.embedding(tokens))
    filled = [torch.where(mask[..., None], v, _means(v, mask)).flatten(1) for v in (x, y.detach())]
    expected = 1 - cka(*filled)
    torch.testing.assert_close(torch.stack(losses).sum(), expected.detach())
    wanted = torch.autograd.grad(expected, target.first.weight)[0]
    torch.testing.assert_close(target.first.weight.grad, wanted)


def _means(x: Tensor, mask: Tensor) -> Tensor:
    """The mean over real entries at each position, [T, d]."""
    return torch.stack([x[mask[:, t], t].mean(0) for t in range(mask.shape[1])])


def test_a_forced_covariance_layout_refuses_padding() -> None:
    target, guide = Sequences(6), Sequences(9)
    guidance = Guidance(target, guide, layout="covariance")
    with guidance.record(mask=torch.ones(12, 4, dtype=torch.bool)):
        guidance.run_guide(torch.zeros(12, 4, dtype=torch.int64))
        target(torch.zeros(12, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="cannot leave out the padding of flattened sequences"):
        guidance.loss()
