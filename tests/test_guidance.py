"""The promise: W processes x k micro-batches give the loss, gradient and parameters of one process (DESIGN 1)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Pool
from reference import cka
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scale_guide import Guidance
from scale_guide.statistics import Pair, Wires

N = 24


def networks(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    target = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 9), nn.Tanh(), nn.Linear(9, 3))
    guide = nn.Sequential(
        nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 20), nn.Linear(20, 3)
    )
    return target.double(), guide.double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 6, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (N,), generator=generator)


def train_literally(num_steps: int, weight: float) -> tuple[list[float], list[Tensor]]:
    """Whole batch, ordinary autograd, the literal CKA: three guide layers spread over two target layers."""
    target, guide = networks()
    x, y = data()
    optimizer = torch.optim.SGD(target.parameters(), lr=0.5)
    losses = []
    for _ in range(num_steps):
        ours = [target[0](x)]
        ours.append(target[2](target[1](ours[0])))
        theirs = [guide[:1](x), guide[:3](x), guide[:5](x)]
        pairs = ((0, 0), (0, 1), (1, 2))
        loss = nn.functional.cross_entropy(target(x), y)
        loss = loss + weight * sum(1 - cka(ours[t], theirs[g].detach()) for t, g in pairs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach().clone() for p in target.parameters()]


def train_guided(
    group: Any, *, num_steps: int, weight: float, layout: str, k: int = 1
) -> tuple[list[float], list[Tensor]]:
    """The same by Guidance, under DDP when there are several processes, in k micro-batches of each rank."""
    target, guide = networks()
    lines = Wires(group)
    x, y = (part.tensor_split(lines.size)[lines.rank] for part in data())
    bare, target = target, DistributedDataParallel(target, process_group=group) if lines.size > 1 else target
    guidance = Guidance(bare, guide, weight=weight, layout=layout, num_micro_batches=k, group=group)
    optimizer = torch.optim.SGD(target.parameters(), lr=0.5)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = accumulate(target, guidance, list(zip(x.chunk(k), y.chunk(k), strict=True)), k)
        optimizer.step()
        losses.append(loss)
    return losses, [p.detach().clone() for p in bare.parameters()]


def accumulate(target: nn.Module, guidance: Guidance, micro_batches: list[tuple[Tensor, Tensor]], k: int) -> float:
    """One step's loss on this rank, after its backward passes: one pass for k = 1, two for more."""
    if k > 1:
        for x, _ in micro_batches:
            with torch.no_grad(), guidance.record():
                guidance.run_guide(x)
                target(x)
            guidance.collect()
        guidance.reduce()
    total = 0.0
    for j, (x, y) in enumerate(micro_batches):
        quiet = isinstance(target, DistributedDataParallel) and j < k - 1
        with target.no_sync() if quiet else torch.enable_grad():
            with guidance.record():
                if k == 1 or guidance.needs_guide_again:
                    guidance.run_guide(x)
                output = target(x)
            loss = nn.functional.cross_entropy(output, y) / k + guidance.loss()
            loss.backward()
        total += loss.item()
    return total


@pytest.mark.parametrize("layout", ["gather", "transpose", "covariance", "auto"])
@pytest.mark.parametrize(("world_size", "k"), [(1, 1), (1, 3), (2, 1), (2, 3), (3, 1), (4, 2)])
def test_losses_and_parameters_equal_one_process(pool: Pool, world_size: int, k: int, layout: str) -> None:
    expected_losses, expected = train_literally(4, 0.7)
    results = pool.run(train_guided, world_size, num_steps=4, weight=0.7, layout=layout, k=k)
    mean_losses = torch.tensor([losses for losses, _ in results], dtype=torch.float64).mean(0)
    torch.testing.assert_close(mean_losses, torch.tensor(expected_losses, dtype=torch.float64), rtol=1e-10, atol=0)
    before = list(networks()[0].parameters())
    for _, parameters in results:
        for start, parameter, wanted in zip(before, parameters, expected, strict=True):
            # Updates, not parameters: a wrong gradient hides behind a large weight.
            difference = (parameter - wanted).norm() / (wanted - start.detach()).norm()
            assert float(difference) < 1e-9


def test_the_gradient_would_be_seen_if_it_were_wrong() -> None:
    """The tolerance above means something: leaving the guidance out moves the update by far more."""
    _, guided = train_literally(4, 0.7)
    _, alone = train_literally(4, 0.0)
    before = [p.detach() for p in networks()[0].parameters()]
    moved = [float((a - b).norm() / (a - s).norm()) for a, b, s in zip(guided, alone, before, strict=True)]
    assert min(moved[:4]) > 1e-2


def test_last_names_every_pair_with_its_floor() -> None:
    target, guide = networks()
    x, _ = data()
    guidance = Guidance(target, guide)
    with guidance.record():
        guidance.run_guide(x)
        target(x)
    value = guidance.loss()
    last = guidance.last
    assert list(last["pairs"]) == ["0 <- 0", "0 <- 2", "2 <- 4"]
    assert float(value.detach()) == pytest.approx(sum(1 - pair["similarity"] for pair in last["pairs"].values()))
    first = last["pairs"]["0 <- 0"]
    ours, theirs = target[0](x), guide[0](x)
    assert first["debiased"] == pytest.approx(float(cka(ours, theirs, "debiased").detach()))
    shuffled = [float(cka(ours[torch.randperm(N)], theirs).detach()) for _ in range(400)]
    assert first["floor"] == pytest.approx(sum(shuffled) / 400, rel=0.05)
    assert last["seconds"] > 0
    value.backward()
    assert last["gradient_square"] > 0


def test_weight_may_change_between_steps_and_reaches_the_gradient() -> None:
    target, guide = networks()
    x, _ = data()
    guidance = Guidance(target, guide)
    gradients = []
    for weight in (1.0, 3.0):
        guidance.weight = weight
        target.zero_grad()
        with guidance.record():
            guidance.run_guide(x)
            target(x)
        guidance.loss().backward()
        gradients.append(target[0].weight.grad.clone())
    torch.testing.assert_close(gradients[1], 3 * gradients[0])


def test_examples_of_weight_zero_were_never_there() -> None:
    x, _ = data()
    weights = torch.ones(N)
    weights[4:9] = 0
    results = []
    for rows, given in ((x, weights), (x[weights > 0], None)):
        target, guide = networks()
        guidance = Guidance(target, guide)
        with guidance.record(weights=given):
            guidance.run_guide(rows)
            target(rows)
        loss = guidance.loss()
        loss.backward()
        results.append((loss.detach(), target[0].weight.grad))
    torch.testing.assert_close(results[0], results[1])


def test_a_loss_scale_reaches_the_injected_gradient_in_low_precision() -> None:
    target, guide = networks()
    target = target.bfloat16()
    x, _ = data()
    guidance = Guidance(target, guide)
    with guidance.record():
        guidance.run_guide(x)
        target(x.bfloat16())
    loss = guidance.loss()
    assert loss.dtype == torch.float64
    (loss * 1024).backward()
    assert target[0].weight.grad.dtype == torch.bfloat16
    assert target[0].weight.grad.abs().max() > 0


def test_hooks_go_and_states_do_not_mix() -> None:
    target, guide = networks()
    guidance = Guidance(target, copy.deepcopy(guide), pairs=[Pair("2", "4")])
    x, _ = data()
    for _ in range(2):
        with guidance.record():
            guidance.run_guide(x)
            target(x)
        guidance.loss()
    with pytest.raises(ValueError, match="nothing to reduce"):
        guidance.reduce()
    guidance.close()
    assert not any(module._forward_hooks for module in target.modules())


def test_no_pairs_is_an_error_of_its_own() -> None:
    target, _ = networks()
    x, _ = data()
    only_logits = nn.Sequential(nn.Linear(6, 3).double())
    guidance = Guidance(target, only_logits)
    with guidance.record():
        guidance.run_guide(x)
        target(x)
    with pytest.raises(ValueError, match="no pairs between 2 target and 0 guide layers"):
        guidance.loss()


def test_the_plan_is_made_for_the_whole_step() -> None:
    """The rows of all micro-batches decide which layout is cheapest, not those of one."""
    target, guide = networks()
    x, y = data()
    guidance = Guidance(target, guide, num_micro_batches=3)
    accumulate(target, guidance, list(zip(x.chunk(3), y.chunk(3), strict=True)), 3)
    assert guidance.plan is not None
    assert guidance.plan.num_rows == N


@pytest.mark.parametrize(("side", "layer"), [("target", "2"), ("guide", "4")])
def test_a_layer_without_spread_is_named_once(side: str, layer: str) -> None:
    target, guide = networks()
    x, _ = data()
    flat = dict(target.named_modules() if side == "target" else guide.named_modules())[layer]
    nn.init.zeros_(flat.weight)
    guidance = Guidance(target, guide)
    for step in range(2):
        with guidance.record():
            guidance.run_guide(x)
            target(x)
        guidance.loss()
        if step:
            last = guidance.last  # warnings are errors: a second one would end the test here
        else:
            with pytest.warns(UserWarning, match=f"{side} layer '{layer}' has no spread"):
                last = guidance.last
        assert last["pairs"]["2 <- 4"] == {"similarity": 0.0, "debiased": 0.0, "floor": 0.0}
