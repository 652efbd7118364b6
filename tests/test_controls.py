"""Baselines and controls: most are variants of a recipe, three are options of their own; and the flavours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from scale_guide.__main__ import main
from scale_guide.distillation import Distillation
from scale_guide.engine import Engine
from scale_guide.guidance import Guidance
from scale_guide.guide import Guide
from scale_guide.lookup import PACKAGE
from scale_guide.models import deep_fcn
from scale_guide.reading import Draws, Reading, as_read, with_noise
from scale_guide.recipe import read_recipe, variants
from scale_guide.tasks import copy_paste, parity
from scale_guide.tracking import read_metrics
from scale_guide.trainer import guided_step

NETWORK = {"depth": 2, "first_width": 16, "width": 8, "batch_norm": False, "dropout": 0.0}
TARGET = {"depth": 3, "first_width": 16, "width": 16, "dropout": 0.0}
RECIPE: dict[str, Any] = {
    "task": {"name": "toy:build"},
    "target": {"name": "deep_fcn", "options": TARGET},
    "guide": {"name": "deep_fcn", "options": NETWORK},
    "optimizer": {"name": "adamw", "lr": 0.01},
    "training": {"batch_size": 32, "micro_batch_size": 16, "steps": 4, "num_workers": 0, "log_every": 1},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "unguided": {"guidance.weight": 0},
    "guide_alone": {"target.options": NETWORK, "guidance.weight": 0},
    "trained": {"guide.weights": "guide_alone"},
    "untrained": {"guide.weights": None},
    "own_architecture": {"guide.options": TARGET},
    "first_steps": {"guidance.stop_after": 2},
    "noise_first": {"guidance.warmup_steps": 2, "guidance.warmup_input": "noise"},
    "one_sided": {
        "guidance.warmup_steps": 2,
        "guidance.warmup_input": "released_noise",
        "guidance.warmup_noise_for": "guide",
    },
    "noise_fed": {"guide.input": "noise"},
    "shuffled": {"guide.input": "shuffled"},
    "distilled": {"guidance.weight": 0, "guidance.distillation": 0.5, "guidance.distillation_temperature": 2},
    "distilled_and_guided": {"guidance.distillation": 0.5, "guidance.distillation_temperature": 2},
    "distilled_first_steps": {"guidance.weight": 0, "guidance.distillation": 0.5, "guidance.stop_after": 2},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of every control."""
    folder = tmp_path_factory.mktemp("controls")
    (folder / "controls.yaml").write_text(yaml.safe_dump(RECIPE | {"variants": VARIANTS}, sort_keys=False))
    assert main(["train", "--config", str(folder / "controls.yaml"), "--run_dir", str(folder / "runs")]) == 0
    return folder / "runs"


def logged(run: Path, name: str) -> list[float | None]:
    return [line.get(name) for line in read_metrics(run) if "task_loss" in line]


def test_every_control_trains_on_the_same_data_from_the_same_weights(runs: Path) -> None:
    first = {name: logged(runs / name, "task_loss")[0] for name in VARIANTS}
    assert first.pop("noise_first") is None
    assert first.pop("guide_alone") != first["unguided"], "another network"
    assert len(set(first.values())) == 1


def test_what_each_control_leaves_in_the_log(runs: Path) -> None:
    def counted(name: str, value: str) -> int:
        return sum(entry is not None for entry in logged(runs / name, value))

    unguided = ("unguided", "guide_alone", "distilled", "distilled_first_steps")
    steps = {name: 0 if name in unguided else 4 for name in VARIANTS} | {"first_steps": 2}
    assert {name: counted(name, "guidance_loss") for name in VARIANTS} == steps
    distilled = {"distilled": 4, "distilled_and_guided": 4, "distilled_first_steps": 2}
    assert {n: counted(n, "distillation_loss") for n in VARIANTS} == dict.fromkeys(VARIANTS, 0) | distilled
    assert [value is None for value in logged(runs / "noise_first", "task_loss")] == [True, True, False, False]
    assert counted("one_sided", "task_loss") == 4, "the target reads data, whose loss can be looked at"
    kinds = ("trained", "untrained", "own_architecture", "noise_fed", "shuffled", "noise_first", "one_sided")
    assert len({logged(runs / name, "guidance_loss")[0] for name in kinds}) == len(kinds)
    same = ("untrained", "first_steps", "distilled_and_guided")
    assert len({logged(runs / name, "guidance_loss")[0] for name in same}) == 1


def test_a_guide_trained_here_first(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is the earlier variant's target; the order counts, and finished variants are found again."""
    config = yaml.safe_load((runs / "trained/config.yaml").read_text())
    assert config["guide"]["weights"] == str(runs / "guide_alone")
    facts = {name: json.loads((runs / name / "environment.json").read_text()) for name in ("trained", "untrained")}
    network = deep_fcn.build(num_classes=5, input_shape=(12, 1, 1), **NETWORK)  # type: ignore[arg-type]
    network.load_state_dict(load_file(runs / "guide_alone/target/model.safetensors"))
    assert facts["trained"]["guide_hash"] == Guide(network).fingerprint() != facts["untrained"]["guide_hash"]
    recipe = str(runs.parent / "controls.yaml")
    capsys.readouterr()
    command = ["train", "--config", recipe, "--run_dir", str(runs)]
    assert main([*command, "--only", "trained,guide_alone"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("already finished") == 2
    assert printed.index("guide_alone  already") < printed.index("trained  already"), "the recipe's order"
    assert "unguided  already" not in printed
    assert main([*command, "--only", "guide_alone,trained", "--training.steps=5"]) == 2
    assert "guide hash was" in capsys.readouterr().err, "its guide has changed by a step"


def test_resuming_with_the_same_trained_guide(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run folder that was moved goes on: the guide's hash counts, not where it lies."""
    moved = tmp_path / "moved"
    recipe = RECIPE | {"variants": {name: VARIANTS[name] for name in ("guide_alone", "trained")}}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    command = ["train", "--config", str(tmp_path / "two.yaml"), "--run_dir"]
    assert main([*command, str(tmp_path / "first")]) == 0
    (tmp_path / "first").rename(moved)
    capsys.readouterr()
    assert main([*command, str(moved), "--only=trained", "--training.steps=6"]) == 0
    assert "resumed from step 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--variants", "{a: {guide.weights: b}, b: {}}"], "variants.a: guide.weights='b' is a variant that is not"),
        (["--variants", "{a: {guide.weights: a}}"], "variants.a: guide.weights='a' is a variant that is not trained"),
        (
            ["--variants", "{guide_alone: {}, a: {guide.weights: guide_alon}}"],
            "guide.weights='guide_alon' is no variant trained before, and guide_alon does not exist. Give a",
        ),
        (
            ["--variants", "{guide_alone: {}, a: {guide.weights: guide_alon}}"],
            "Variants of this recipe: guide_alone, a (did you mean 'guide_alone'?).",
        ),
        (
            ["--variants", "{alone: {}, other: {}, a: {guide.weights: alone}}", "--only=other,a"],
            "alone does not exist",
        ),
        (["--variants", "{a: {}}", "--only=b"], "--only: variant='b' is not known. Known: a."),
        (["--only=b"], "--only: variant='b' is not known. Known: none."),
        (["--guidance.distillation=-1"], "guidance.distillation=-1.0 must be a finite number, 0 or more"),
        (["--guidance.distillation=1", "--guidance.distillation_temperature=0"], "temperature=0.0 must be a finite"),
        (
            ["--guidance.distillation=1", "--guidance.weight=0", "--guide.options.num_classes=4"],
            "for (2,) scored terms the target gives (2, 5) and the guide (2, 4). Make them alike",
        ),
        (["--guidance.warmup_noise_for=guide"], "has no effect with guidance.warmup_input='data'"),
        (["--guide.input=shuffled", "--training.micro_batch_size=1"], "guide.input='shuffled' shuffles the rows of"),
        (["--guide.input=mixed"], "guide.input"),
    ],
)
def test_mistakes(options: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    run = tmp_path / "run"
    assert main(["train", "--config", str(tmp_path / "recipe.yaml"), "--run_dir", str(run), *options]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.strip().splitlines()) == 1
    assert not run.exists(), "nothing was trained"


# What the guide reads

DRAWS = Draws(seed=5, step=2)


def read(batches: list[dict[str, Tensor]], task: Any, draws: Draws = DRAWS, **asked: Any) -> list[dict[str, Tensor]]:
    return as_read(batches, task, Reading(**asked), draws)


def numbered(num_rows: int) -> dict[str, Tensor]:
    return {"input": torch.arange(num_rows)[:, None].float(), "weight": torch.ones(num_rows)}


def test_shuffled_rows_leave_no_row_in_its_place() -> None:
    """All that count move; 2 processes x 3 micro-batches read what 1 x 6 do; the target reads the data."""
    batch = numbered(9)
    batch["weight"][[1, 5]] = 0
    whole = read([batch] * 6, toy.build(), guide_input="shuffled")
    for one in whole:
        order = one["guide_input"].flatten().long()
        assert sorted(order.tolist()) == list(range(9))
        assert [i for i in range(9) if order[i] == i] == [1, 5], "what does not count stays where nobody looks"
        assert torch.equal(one["input"], batch["input"])
    assert len({tuple(one["guide_input"].flatten().tolist()) for one in whole}) == 6
    for rank in (0, 1):
        parts = read([batch] * 3, toy.build(), Draws(5, 2, rank, world_size=2), guide_input="shuffled")
        for j, part in enumerate(parts):
            assert torch.equal(part["guide_input"], whole[2 * j + rank]["guide_input"])
    assert "guide_input" not in batch


def test_masks_travel_with_shuffled_rows() -> None:
    """Of two padded rows, those positions count where both have a token."""
    task = copy_paste.build(min_length=2, max_length=20, num_train=16, num_validation=1)
    batch = task.collate([task.train[i] for i in range(16)])
    (made,) = read([batch], task, guide_input="shuffled")
    came_from = [(made["guide_input"][i] == batch["input"]).all(1).nonzero().item() for i in range(16)]
    assert sorted(came_from) == list(range(16))
    assert torch.equal(made["common_mask"], batch["mask"] & batch["mask"][came_from])
    assert torch.equal(made["mask"], batch["mask"])


def test_noise_for_the_guide_is_not_the_warmups() -> None:
    task, batch = toy.build(), {"input": torch.ones(4, 12), "weight": torch.ones(4)}
    (fed,) = read([batch], task, guide_input="noise")
    assert torch.equal(fed["input"], batch["input"])
    (both,) = read([batch], task, warmup="noise")
    assert "guide_input" not in both
    (one_sided,) = read([batch], task, warmup="noise", noise_for="guide")
    assert torch.equal(one_sided["input"], batch["input"])
    assert torch.equal(one_sided["guide_input"], both["input"])
    (apart,) = read([batch], task, warmup="noise", guide_input="noise")
    assert torch.equal(apart["guide_input"], fed["guide_input"])
    assert torch.equal(apart["input"], both["input"])
    assert not torch.equal(fed["guide_input"], both["input"])
    (mixed,) = read([batch], task, warmup="noise", guide_input="shuffled")
    assert torch.equal(mixed["guide_input"].sort(dim=0).values, both["input"].sort(dim=0).values)
    assert torch.equal(both["input"], with_noise([batch], "noise", task, DRAWS)[0]["input"])


# Distillation


class Scored(toy.Task):
    """The toy task on float64 rows."""

    def batches(self) -> list[dict[str, Tensor]]:
        whole = self.collate([self.train[i] for i in range(16)])
        whole["weight"][[2, 11, 12]] = 0
        whole["input"] = whole["input"].double()
        return [{name: value[rows] for name, value in whole.items()} for rows in (slice(8), slice(8, 16))]


def literal_divergence(output: Tensor, guide_output: Tensor, temperature: float) -> Tensor:
    """T^2 KL(guide || target) of one row, one class at a time."""
    total = output.new_zeros(())
    for c in range(len(output)):
        ours = (output[c] / temperature).exp() / (output / temperature).exp().sum()
        theirs = (guide_output[c] / temperature).exp() / (guide_output / temperature).exp().sum()
        total = total + theirs * (theirs.log() - ours.log())
    return temperature**2 * total


@pytest.mark.parametrize("guided", [False, True])
def test_distillation_against_a_literal_reference(guided: bool) -> None:
    """Loss, log and gradient of a step of 2 micro-batches in float64, with rows that do not count."""
    torch.manual_seed(0)
    task, batches = Scored(None), Scored(None).batches()
    target = nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 5)).double()
    guide = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 5)).double()
    start = {name: value.detach().clone() for name, value in target.named_parameters()}
    outputs = [(target(b["input"]), guide(b["input"]).detach(), b) for b in batches]
    rows = [(o[i], g[i], b["target"][i]) for o, g, b in outputs for i in range(8) if b["weight"][i] > 0]
    divergence = torch.stack([literal_divergence(o, g, 3.0) for o, g, _ in rows]).sum() / 13 * 0.7
    loss = torch.stack([-o.log_softmax(0)[t] for o, _, t in rows]).sum() / 13 + divergence
    wanted = torch.autograd.grad(loss, list(target.parameters()))
    engine, frozen = Engine(), Guide(guide)
    prepared = engine.prepare(target, torch.optim.SGD(target.parameters(), lr=1.0), micro_batch_size=8)
    lists = {"pairs": [["0", "0"]], "target_layers": ["0"], "guide_layers": ["0"], "num_micro_batches": 2}
    guidance = Guidance(target, frozen, weight=1e-30, **lists) if guided else None
    log = guided_step(
        batches,
        target=prepared,
        task=task,
        engine=engine,
        guidance=guidance,
        distillation=Distillation(frozen, 0.7, 3.0),
    )
    assert log.distillation_sum is not None
    assert float(log.distillation_sum / log.count) == pytest.approx(divergence.item(), rel=1e-9)
    # The toy task's own loss is in fp32.
    for (name, value), gradient in zip(target.named_parameters(), wanted, strict=True):
        torch.testing.assert_close(value.detach(), start[name] - gradient, rtol=1e-6, atol=1e-7)
    if guidance is not None:
        guidance.close()


def test_distillation_of_tokens_counts_what_the_task_scores() -> None:
    task = copy_paste.build(min_length=2, max_length=4, num_train=6, num_validation=1)
    batch = task.collate([task.train[i] for i in range(6)])
    batch["weight"][3] = 0
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, *batch["input"].shape, 13, dtype=torch.float64)
    loss = Distillation(Guide(nn.Linear(1, 1)), 1.0, 2.0).loss(ours, theirs, task.scored(batch))
    places = task.scored(batch).nonzero().tolist()
    expected = torch.stack([literal_divergence(ours[i, t], theirs[i, t], 2.0) for i, t in places]).sum()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("task", [copy_paste, parity])
def test_count_is_the_sum_of_scored(task: Any) -> None:
    made = task.build(num_train=8, num_validation=1)
    batch = made.collate([made.train[i] for i in range(8)])
    batch["weight"][2] = 0
    assert made.count(batch) == made.scored(batch).double().sum() > 0
    assert not made.scored(batch)[2].any()


# Flavours


def test_configs_merge_in_their_order(tmp_path: Path) -> None:
    """A later file changes what it names, a dotted name one entry of a mapping; the command line comes last."""
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(RECIPE | {"variants": VARIANTS}))
    (tmp_path / "two.yaml").write_text(
        "target.options.width: 9\ntarget: {layers: blocks}\nguidance.collision: last\nvariants: {a: {}}\n"
    )
    files = [f"--config={tmp_path / name}.yaml" for name in ("one", "two")]
    recipe, _ = read_recipe("train", [files[0], "--guidance.collision=mean", files[1], "--target.options.depth", "7"])
    assert recipe.target.options == TARGET | {"width": 9, "depth": 7}
    assert recipe.target.layers == "blocks"
    assert recipe.guidance.collision == "mean"
    assert recipe.variants == {"a": {}}
    assert recipe.run_dir == "runs/one_two"
    for text in ("optimizer: {lr: 2e-4}", "guidance.weight: 2e-4\noptimizer: {lr: 2e-4}"):
        (tmp_path / "two.yaml").write_text(text)
        recipe, _ = read_recipe("train", files)
        assert recipe.optimizer.lr == 2e-4, "a number, though not by YAML 1.1"
    assert recipe.guidance.weight == 2e-4
    (tmp_path / "two.yaml").write_text("target.wieght.width: 9")
    with pytest.raises(ValueError, match=r"two\.yaml: target\.wieght\.width is not an option"):
        read_recipe("train", files)


FLAVOURS = sorted(path.stem for path in (PACKAGE / "recipes/flavours").glob("*.yaml"))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_flavours(flavour: str) -> None:
    """Found by their bare names; each says what it reproduces and where PAPER.md tells of it."""
    text = (PACKAGE / "recipes/flavours" / f"{flavour}.yaml").read_text()
    assert text.startswith(f"# --config RECIPE --config {flavour}")
    assert "PAPER.md" in text
    base = "small/copy_paste" if flavour == "leaky_state" else "quickstart"
    recipe, _ = read_recipe("train", ["--config", base, "--config", flavour])
    plain, _ = read_recipe("train", ["--config", base])
    assert recipe.run_dir == f"runs/{base}_{flavour}"
    assert recipe.task == plain.task
    assert recipe != plain
    assert variants(recipe)


def test_flavours_choose_other_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    """Wide target of few layers: written, one term per guide layer; released, one per target layer."""
    small = ["--target.options.depth=3", "--target.options.width=8", "--target.options.first_width=8"]
    pairs = {}
    for flavour in ("as_written", "as_released"):
        assert main(["layers", "--config", "quickstart", "--config", flavour, *small]) == 0
        pairs[flavour] = capsys.readouterr().out.rpartition("pairs")[2].count("| hidden.")
    assert pairs["as_released"] == 3
    assert pairs["as_written"] > 3


@pytest.mark.slow
def test_the_initialisation_study(tmp_path: Path) -> None:
    """Its variants run: alignment on noise for both or for the guide, on data, or beside the task."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    files = ["--config", str(tmp_path / "recipe.yaml"), "--config", "initialisation"]
    run = ["--run_dir", str(tmp_path / "run"), "--training.steps=302", "--training.log_every=50"]
    assert main(["train", *files, *run, "--training.micro_batch_size=null"]) == 0
    guided = {p.parent.name: logged(p.parent, "guidance_loss") for p in (tmp_path / "run").glob("*/metrics.jsonl")}
    counts = {name: sum(value is not None for value in values) for name, values in guided.items()}
    assert counts == {"unguided": 0, "poster": 3, "project_page": 3, "released": 6, "later": 6, "one_sided": 3}
    assert logged(tmp_path / "run/poster", "task_loss")[:4].count(None) == 3
    assert None not in logged(tmp_path / "run/one_sided", "task_loss")
