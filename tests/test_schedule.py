"""What changes from step to step: rates and weights, warm-up on data and noise, and the end of guidance."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from reference import cka
from safetensors.torch import load_file
from torch import Tensor, nn

import scale_guide.run
from scale_guide.__main__ import main
from scale_guide.config import GuidanceConfig, OptimizerConfig, Recipe
from scale_guide.engine import Engine
from scale_guide.guidance import Guidance
from scale_guide.reading import Draws, Reading, with_noise
from scale_guide.schedule import Schedule, describe
from scale_guide.tracking import read_metrics
from scale_guide.trainer import StepLog, guided_step


def schedule(num_steps: int = 12, **guidance: Any) -> Schedule:
    return Schedule(Recipe(guidance=GuidanceConfig(**guidance)), num_steps, 3)


def rates(num_steps: int, **optimizer: Any) -> list[float]:
    made = Schedule(Recipe(optimizer=OptimizerConfig(lr=1.0, **optimizer)), num_steps, 3)
    return [made.learning_rate(step) for step in range(num_steps)]


def test_learning_rate() -> None:
    cosine = rates(12, schedule="cosine", warmup_steps=4)
    assert cosine[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert cosine[8] == pytest.approx(0.5)
    assert cosine[11] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert rates(13, schedule="step", gamma=0.1, step_epochs=2) == pytest.approx([1.0] * 6 + [0.1] * 6 + [0.01])


def test_guidance_weight() -> None:
    """Whole up to the end of the warm-up, falling to what would be 0 in the first step without a guide."""

    def weights(**guidance: Any) -> list[float]:
        made = schedule(8, weight=2.0, **guidance)
        return [made.guidance_weight(step) for step in range(8)]

    assert weights() == [2.0] * 8
    assert weights(stop_after=3) == [2.0] * 3 + [0.0] * 5
    assert weights(schedule="linear") == [2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25]
    assert weights(schedule="linear", warmup_steps=2, stop_after=6) == [2.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0, 0.0]
    assert weights(schedule="linear", warmup_steps=3, stop_after=3) == [2.0] * 3 + [0.0] * 5
    cosine = weights(schedule="cosine", stop_after=4)
    assert cosine == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5), 0, 0, 0, 0])
    assert weights(schedule="linear", stop_after=80)[-1] == 2 * (1 - 7 / 80), "as in the run that is long enough"


def test_phases() -> None:
    made = schedule(warmup_steps=2, warmup_input="noise", stop_after=4, reset_optimizer=True)
    assert [made.warmup(step) for step in range(3)] == ["noise", "noise", None]
    assert [made.guidance_is_over(step) for step in range(3, 6)] == [False, True, True]
    assert [step for step in range(12) if made.starts_anew(step)] == [2, 4]
    assert not any(schedule(warmup_steps=2).starts_anew(step) for step in range(12))
    assert [step for step in range(12) if schedule(stop_after=3, reset_optimizer=True).starts_anew(step)] == [3]
    told = describe(made.recipe.guidance)
    assert told == ", 2 steps of guidance alone on noise first, no guide after step 4"
    assert describe(GuidanceConfig()) == ""


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"weight": -1.0}, "guidance.weight=-1.0 must be a finite number"),
        ({"weight": math.nan}, "guidance.weight=nan must be a finite number"),
        ({"warmup_steps": -1}, "guidance.warmup_steps=-1 must be 0 or more"),
        ({"warmup_steps": 12}, "less than the 12 steps"),
        ({"warmup_steps": 2, "weight": 0.0}, "nothing to minimise with guidance.weight=0"),
        ({"warmup_steps": 5, "stop_after": 4}, "must not be more than guidance.stop_after=4"),
        ({"stop_after": 0}, "guidance.stop_after=0 must be at least 1"),
        ({"warmup_input": "noise"}, "no effect with guidance.warmup_steps=0"),
        ({"reset_optimizer": True}, "there is neither"),
    ],
)
def test_schedules_that_cannot_work(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        schedule(**options)


def test_settings_of_a_guidance_that_is_off_are_not_asked_about() -> None:
    """A variant without guidance inherits the settings of the one with it."""
    schedule(weight=0.0, stop_after=3, schedule="linear", warmup_input="noise")


class Bent(nn.Module):
    """Two linear layers and a head; one logit may be masked, and they come in a mapping, as a Transformer's do."""

    def __init__(self, mask: float) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 7), nn.Linear(7, 6), nn.Linear(6, 5)
        self.mask = mask

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.second(self.first(x).tanh()).tanh())
        return {"logits": logits + torch.tensor([0, 0, 0, 0, self.mask])}


class ToyTask(toy.Task):
    """The toy task with a loss that reads logits from a mapping."""

    def loss(self, output: Any, batch: dict[str, Tensor]) -> Tensor:
        return super().loss(output["logits"], batch)


@pytest.mark.parametrize(("warmup", "mask"), [("data", 0.0), ("data", -math.inf), ("released_noise", 0.0)])
def test_a_warmup_step_minimises_the_guidance_loss_alone(warmup: Any, mask: float) -> None:
    """Against literal autograd in float64, over 2 micro-batches; the head has a gradient, of zero."""
    torch.manual_seed(0)
    task, target = ToyTask(None), Bent(mask).double()
    guide = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 9)).double()
    before = {name: value.detach().clone() for name, value in target.named_parameters()}
    whole = task.collate([task.train[i] for i in range(16)])
    whole["input"] = whole["input"].double()
    batches = [{name: value[rows] for name, value in whole.items()} for rows in (slice(8), slice(8, 16))]
    read = batches
    if warmup != "data":
        read = with_noise(batches, warmup, task, Draws(seed=4, step=9))
    x = torch.cat([batch["input"] for batch in read])
    first = target.first(x)
    second = target.second(first.tanh())
    loss = 2 - cka(first, guide[0](x)) - cka(second, guide(x))
    wanted = torch.autograd.grad(0.5 * loss, [*target.first.parameters(), *target.second.parameters()])
    engine = Engine()
    optimizer = torch.optim.SGD(target.parameters(), lr=1.0, weight_decay=0.125)
    prepared = engine.prepare(target, optimizer, micro_batch_size=8)
    pairs = [["first", "0"], ["second", "1"]]
    lists = {"target_layers": ["first", "second"], "guide_layers": ["0", "1"]}
    guidance = Guidance(target, guide, pairs=pairs, num_micro_batches=2, **lists)
    guidance.weight = 0.5
    handed: list[Tensor] = []
    backward = engine.backward
    engine.backward = lambda loss: handed.append(loss.detach()) or backward(loss)  # type: ignore[method-assign]
    log = guided_step(
        batches, target=prepared, task=task, engine=engine, guidance=guidance, reading=Reading(warmup), seed=4, step=9
    )
    guidance.close()
    assert log.guidance_loss is not None
    assert float(log.guidance_loss) == pytest.approx(0.5 * loss.item())
    assert float(sum(handed)) == pytest.approx(0.5 * loss.item()), "no NaN from logits that are infinite"
    assert (log.task_sum is None) == (warmup != "data"), "a task loss is looked at on data alone"
    gradients = dict(zip([n for n in before if "head" not in n], wanted, strict=True))
    for name, value in target.named_parameters():
        # Weight decay acts on the head as on every other parameter.
        moved = gradients.get(name, torch.zeros_like(value)) + 0.125 * before[name]
        torch.testing.assert_close(value.detach(), before[name] - moved, rtol=1e-9, atol=1e-12)


def test_a_reset_optimizer_is_a_new_one() -> None:
    for kind, options in ((torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.SGD, {})):
        torch.manual_seed(0)
        engine, used = Engine(), nn.Linear(4, 3)
        engine.prepare(used, kind(used.parameters(), lr=0.1, **options), micro_batch_size=2)

        def step(loss: Tensor, engine: Engine = engine) -> None:
            with engine.micro_batch(last=True):
                engine.backward(loss)
            engine.step()

        for _ in range(5):
            step(used(torch.randn(2, 4)).square().sum())
        engine.reset_optimizer()
        fresh = nn.Linear(4, 3)
        fresh.load_state_dict(used.state_dict())
        optimizer = kind(fresh.parameters(), lr=0.1, **options)
        for _ in range(3):
            x = torch.randn(2, 4)
            step(used(x).exp().sum())
            fresh(x).exp().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(used.weight, fresh.weight)


TINY = """
task: {name: "toy:build"}
target: {name: deep_fcn, options: {depth: 3, first_width: 16, width: 16, dropout: 0.2}}
guide: {name: deep_fcn, options: {depth: 2, first_width: 16, width: 16, batch_norm: false}, seed: 1}
guidance: {warmup_steps: 3, warmup_input: noise, stop_after: 6, schedule: cosine, reset_optimizer: true}
optimizer: {name: adamw, lr: 0.01, schedule: cosine}
training: {batch_size: 32, micro_batch_size: 16, steps: 9, num_workers: 0, log_every: 1, checkpoint_every: 1}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


def test_a_run_resumes_in_every_phase(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the warm-up, at its end, at the end of guidance and after it: the same weights, bit for bit."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["train", "--config", tiny, "--run_dir", str(whole)]) == 0
    printed = capsys.readouterr().out
    assert "in 2 pairs, 3 steps of guidance alone on noise first, weight falling (cosine) from 1 to 0, no" in printed
    for text in ("the warm-up ended with step 3", "guidance ended with step 6"):
        assert printed.count(text) == 1

    def interrupted(*args: Any, **kwargs: Any) -> StepLog:
        return guided_step(*args, **(kwargs | {"stop": kwargs["step"] in (1, 2, 5, 7)}))

    monkeypatch.setattr(scale_guide.run, "guided_step", interrupted)
    for start in (0, 2, 3, 6, 8):
        assert main(["train", "--config", tiny, "--run_dir", str(cut)]) == 0
        printed = capsys.readouterr().out
        assert (f"resumed from step {start}" in printed) == (start > 0)
        assert ("guidance ended with step 6" in printed) == (start >= 6), "said once by each process that leaves it"
    first, second = (load_file(run / "target/model.safetensors") for run in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)
    lines = [read_metrics(run)[:9] for run in (whole, cut)]
    for a, b in zip(*lines, strict=True):
        names = ("step", "task_loss", "guidance_weight", "guidance_loss", "pairs", "learning_rate")
        assert [a.get(name) for name in names] == [b.get(name) for name in names]
    falling = [0.5 * (1 + math.cos(math.pi * i / 3)) for i in range(3)]
    assert [line["guidance_weight"] for line in lines[0]] == pytest.approx([1, 1, 1, *falling, 0, 0, 0])
    assert [line["task_loss"] is None for line in lines[0]] == [True] * 3 + [False] * 6, "noise has no labels"
    assert ["guidance_loss" in line for line in lines[0]] == [True] * 6 + [False] * 3


def test_a_falling_weight_belongs_to_the_length_of_the_run(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["train", "--config", tiny, "--run_dir", str(tmp_path / "run"), "--optimizer.schedule=constant"]
    assert main([*options, "--training.steps=7"]) == 0
    assert main([*options, "--training.steps=8"]) == 0, "its end is stop_after, wherever the run ends"
    options[4] = str(tmp_path / "other")
    options += ["--guidance.stop_after=null", "--guidance.warmup_input=data"]
    assert main([*options, "--training.steps=4"]) == 0
    capsys.readouterr()
    assert main([*options, "--training.steps=5"]) == 2
    assert "training.steps was 4 and is now 5" in capsys.readouterr().err


def test_the_guide_is_gone_after_its_last_step(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hook on the target, no guide in memory; what it trains from there is what an unguided step trains."""
    guides: list[weakref.ref[Any]] = []
    seen = []

    def step(*args: Any, **kwargs: Any) -> StepLog:
        guidance = kwargs["guidance"]
        if guidance is not None and not guides:
            guides.append(weakref.ref(guidance.guide.model))
        del guidance
        gc.collect()
        hooks = sum(len(module._forward_hooks) for module in kwargs["target"].modules())
        seen.append((kwargs["guidance"] is not None, hooks > 0, guides[0]() is not None))
        return guided_step(*args, **kwargs)

    monkeypatch.setattr(scale_guide.run, "guided_step", step)
    assert main(["train", "--config", tiny, "--run_dir", str(tmp_path / "run")]) == 0
    assert seen == [(True, True, True)] * 6 + [(False, False, False)] * 3
