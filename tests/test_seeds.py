"""Runs are put together by what they have in common, and their numbers over seeds are the textbook's."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import run_folders
from hypothesis import given, settings
from hypothesis import strategies as st

from scale_guide.analysis import report
from scale_guide.analysis.groups import Group, group, unguided
from scale_guide.analysis.records import Record, read_runs
from scale_guide.analysis.seeds import Difference, estimate, paired_difference
from scale_guide.analysis.table import compare

VALUES = st.floats(-1e6, 1e6)


@given(st.lists(VALUES, min_size=2, max_size=8))
def test_mean_and_standard_error(values: list[float]) -> None:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    found = estimate(values)
    assert found.mean == pytest.approx(mean, abs=1e-6)
    assert found.error == pytest.approx(math.sqrt(variance / len(values)), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.8012], "0.8012"),
        ([0.78, 0.80, 0.82], "0.800 +- 0.012"),
        ([69.0, 72.0], "70.5 +- 1.5"),
        ([51_000.0, 52_000.0], "51500 +- 500"),
        ([0.5, 0.5], "0.5"),
        ([3e-9, 5e-9], "4e-09 +- 1e-09"),
    ],
)
def test_estimates_are_told_to_two_digits_of_their_error(values: list[float], text: str) -> None:
    assert str(estimate(values)) == text


def test_the_interval_of_a_difference_is_that_of_resampled_seeds() -> None:
    """Against a loop that draws seeds with replacement; only seeds that both have count."""
    generator = random.Random(0)
    ours = {seed: 0.8 + generator.gauss(0, 0.02) for seed in range(8)}
    others = {seed: 0.4 + generator.gauss(0, 0.05) for seed in range(2, 10)}
    differences = [ours[seed] - others[seed] for seed in range(2, 8)]
    means = sorted(sum(generator.choices(differences, k=6)) / 6 for _ in range(20_000))
    found = paired_difference(ours, others)
    assert found is not None
    assert found.mean == pytest.approx(sum(differences) / 6)
    spread = means[-1] - means[0]
    assert (found.low, found.high) == pytest.approx((means[500], means[19_500]), abs=0.03 * spread)
    assert paired_difference({0: 1.0, 1: 2.0}, {0: 0.5, 2: 1.0}) is None, "one pair tells no interval"


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=5))
def test_a_difference_lies_inside_its_interval(pairs: list[tuple[float, float]]) -> None:
    found = paired_difference(dict(enumerate(a for a, _ in pairs)), dict(enumerate(b for _, b in pairs)))
    assert found is not None
    differences = [a - b for a, b in pairs]
    tiny = 1e-9 * (1 + max(map(abs, differences)))
    assert min(differences) - tiny <= found.low <= found.mean + tiny <= found.high + 2 * tiny
    assert found.high <= max(differences) + tiny


def test_equal_differences_have_an_interval_of_no_width() -> None:
    assert paired_difference({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.5}) == Difference(0.5, 0.5, 0.5)


def groups_of(path: Path) -> tuple[list[Group], list[str]]:
    return group(read_runs([path])[0])


def test_seeds_of_a_variant_are_one_group_in_the_order_of_training(tmp_path: Path) -> None:
    groups, problems = groups_of(run_folders.quickstart(tmp_path, seeds=3))
    assert problems == []
    assert [one.label for one in groups] == ["unguided", "guided"]
    assert [[record.seed for record in one.records] for one in groups] == [[0, 1, 2]] * 2
    ours = [record.scores["accuracy"] for record in groups[1].records]
    assert groups[1].scores("accuracy") == dict(enumerate(ours))
    table = compare(groups)
    guided = dict(zip(table.head, table.rows[1], strict=True))
    assert guided["seeds"] == "3"
    assert guided["validation accuracy"] == str(estimate(ours))
    theirs = groups[0].scores("accuracy")
    difference = sum(ours[seed] - theirs[seed] for seed in range(3)) / 3
    assert guided["accuracy, difference to unguided"].startswith(f"{difference:+.3g} [")


def test_other_settings_make_another_group_that_says_so(tmp_path: Path) -> None:
    """The place of a guide's weights, logging and launching are no settings; the learning rate is one."""
    for seed in range(2):
        made = run_folders.recipe("guided", seed=seed)
        weights = replace(made.guide, weights=f"runs/seed_{seed}/guide_alone")
        training = replace(made.training, log_every=5 + seed, micro_batch_size=32 * (seed + 1))
        run_folders.make(tmp_path / f"a{seed}", replace(made, guide=weights, training=training))
        faster = replace(made, guide=weights, optimizer=replace(made.optimizer, lr=0.01))
        run_folders.make(tmp_path / f"b{seed}", faster)
    groups, problems = groups_of(tmp_path)
    assert problems == []
    assert [one.label for one in groups] == ["guided, optimizer.lr=0.001", "guided, optimizer.lr=0.01"]
    assert [len(one.records) for one in groups] == [2, 2]


def test_a_guide_is_told_by_its_weight_alone(tmp_path: Path) -> None:
    """A run without one has none of its other settings."""
    for weight in ("0", "1", "2"):
        made = run_folders.recipe("guided", name="swept")
        run_folders.make(tmp_path / weight, replace(made, guidance=replace(made.guidance, weight=float(weight))))
    deeper = replace(made.target, options=made.target.options | {"batch_norm": False})
    run_folders.make(tmp_path / "deeper", replace(made, target=deeper, variant="other"))
    run_folders.make(tmp_path / "plain", replace(made, variant="other"))
    assert [one.label for one in groups_of(tmp_path)[0]] == [
        *(f"guided, guidance.weight={weight}" for weight in (0.0, 1.0, 2.0)),
        "other, target.options.batch_norm=False",
        "other",
    ]


def test_the_same_run_twice_counts_once(tmp_path: Path) -> None:
    made = run_folders.recipe("guided")
    run_folders.make(tmp_path / "old", made, started="2026-01-01")
    run_folders.make(tmp_path / "new", made, started="2026-01-02")
    run_folders.make(tmp_path / "under_way", made, started="2026-01-03", finished=False)
    (one,), problems = groups_of(tmp_path)
    assert [record.path.name for record in one.records] == ["new"]
    assert len(problems) == 2
    assert problems[1] == f"{tmp_path / 'old'}: left out, {tmp_path / 'new'} is the same run once more."


def test_missing_and_unfinished_seeds_are_told(tmp_path: Path) -> None:
    """Means are of finished runs; a seed that another variant has is missed."""
    run_folders.quickstart(tmp_path, seeds=2)
    run_folders.make(tmp_path / "seed_2/guided", run_folders.recipe("guided", seed=2), num_steps=60, finished=False)
    found = report.read([tmp_path])
    guided = found.recipes["quickstart"][1]
    assert [record.seed for record in guided.counted] == [0, 1]
    assert "not finished: step 60 of 500, running, last written" in found.problems[0]
    assert found.problems[1:] == ["quickstart unguided: no run of seed 2."]
    assert "| guided   | 2 (1 running) | 100   |" in str(found)


def bases(records: list[Record]) -> dict[str, str]:
    groups, _ = group(records)
    found = {one.label: unguided(one, groups) for one in groups}
    return {label: base.label for label, base in found.items() if base is not None}


def test_a_guided_run_is_compared_with_the_same_target_alone(tmp_path: Path) -> None:
    """Not with the guide's own training, and where batch sizes differ, with the one of its own."""
    other = ("--target.name", "torchvision.models:resnet18", "--target.options", "{}")
    alone = run_folders.recipe("unguided", *other)
    run_folders.make(tmp_path / "guide_alone", replace(alone, variant="guide_alone"), started="1")
    for size in (64, 256):
        for variant in ("unguided", "guided"):
            made = run_folders.recipe(variant, f"--training.batch_size={size}")
            named = replace(made, variant=f"{size}_{variant}")
            run_folders.make(tmp_path / f"{size}_{variant}", named, started=str(size))
    assert bases(read_runs([tmp_path])[0]) == {"64_guided": "64_unguided", "256_guided": "256_unguided"}


def test_two_runs_without_seeds_are_a_small_table(tmp_path: Path) -> None:
    """What the quickstart ends with."""
    run_folders.quickstart(tmp_path)
    loss = {name: run_folders.lines(100, guided=name == "guided")[-2]["task_loss"] for name in ("unguided", "guided")}
    scores = {name: run_folders.scores(value) for name, value in loss.items()}
    assert str(report.read([tmp_path])).splitlines() == [
        "| run      | steps | validation loss | validation accuracy | training loss | similarity | seconds |",
        "|----------|-------|-----------------|---------------------|---------------|------------|---------|",
        *(
            f"| {name:8} | 100   | {scores[name]['loss']:<15.4g} | {scores[name]['accuracy']:<19.4g} "
            f"| {loss[name]:<13.4g} | {similarity:10} | 10      |"
            for name, similarity in (("unguided", "-"), ("guided", "0.2951"))
        ),
    ]


def test_the_papers_number_stands_beside_ours(tmp_path: Path) -> None:
    made = replace(run_folders.recipe("guided"), published={"guided": "13.10 +- 0.72"})
    run_folders.make(tmp_path / "run", made)
    table = compare(groups_of(tmp_path)[0])
    assert dict(zip(table.head, table.rows[0], strict=True))["paper"] == "13.10 +- 0.72"
    assert "the number in the paper" in table.notes[0]


def test_recipes_have_a_table_each(tmp_path: Path) -> None:
    for name in ("images", "text"):
        made = run_folders.recipe("guided", name=name)
        run_folders.make(tmp_path / name, made, validation={f"score of {name}": 1.0})
    images, text = str(report.read([tmp_path])).split("## text")
    assert images.startswith("## images\n\n| run ")
    assert "score of images" not in text
