"""error_consistency against scikit-learn's Cohen's kappa, its interval, bounds and limits, and its refusals."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap
from sklearn.metrics import cohen_kappa_score

from scale_guide.analysis.error_consistency import (
    error_consistency,
    error_consistency_bounds,
    error_consistency_interval,
)

PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@given(PAIRS)
def test_agrees_with_scikit_learn(pairs: list[tuple[bool, bool]]) -> None:
    a, b = (list(column) for column in zip(*pairs, strict=True))
    if a == b:
        assert error_consistency(a, b) == 1.0
        return
    expected = cohen_kappa_score(a, b, labels=[False, True])
    assert error_consistency(a, b) == pytest.approx(expected, abs=1e-12)


@given(PAIRS)
def test_symmetric_and_within_bounds(pairs: list[tuple[bool, bool]]) -> None:
    a, b = (list(column) for column in zip(*pairs, strict=True))
    kappa = error_consistency(a, b)
    assert -1.0 <= kappa <= 1.0
    assert kappa == error_consistency(b, a)


@pytest.mark.parametrize("num_correct", [0, 1, 5, 10])
def test_equal_vectors_give_one_where_scikit_learn_gives_nan(num_correct: int) -> None:
    correct = np.arange(10) < num_correct
    assert error_consistency(correct, correct) == 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = cohen_kappa_score(correct, correct)
    assert reference == 1.0 or (num_correct in (0, 10) and np.isnan(reference))


def test_opposite_halves_give_minus_one() -> None:
    assert error_consistency([True, False], [False, True]) == -1.0


def test_one_perfect_network_gives_zero() -> None:
    assert error_consistency([1, 1, 1, 1], [1, 0, 1, 0]) == 0.0


def test_independent_networks_give_about_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(100_000, generator=generator) < accuracy for accuracy in (0.7, 0.55))
    assert abs(error_consistency(a, b)) < 0.01


@pytest.mark.parametrize("convert", [list, np.asarray, torch.tensor, lambda v: torch.tensor(v).double()])
def test_every_kind_of_vector(convert: Any) -> None:
    a, b = [True, True, False, False, True], [True, False, False, True, True]
    assert error_consistency(convert(a), convert(b)) == pytest.approx(cohen_kappa_score(a, b))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1, 0], [1, 0, 1], "correct_a has 2 examples and correct_b 3.*same examples"),
        ([], [], r"correct_a has shape \[0\].*one value per example"),
        ([1, 0], [[1, 0]], r"correct_b has shape \[1, 2\]"),
        ([0.3, 1.0], [1, 0], "correct_a must hold only 0 and 1"),
        ([1, 0], [float("nan"), 0.0], "correct_b must hold only 0 and 1"),
    ],
)
def test_refusals_say_what_to_do(a: Any, b: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        error_consistency(a, b)


def answers(n: int, both: float, only_a: float, only_b: float) -> tuple[Any, Any]:
    """Correctness vectors of two networks, from shares of the examples."""
    place = np.arange(n) / n
    return place < both + only_a, (place < both) | ((place >= both + only_a) & (place < both + only_a + only_b))


@pytest.mark.parametrize("n", [40, 397])
def test_interval_is_scipys_bootstrap_over_examples(n: int) -> None:
    a, b = answers(n, 0.5, 0.1, 0.2)
    found = error_consistency_interval(a, b, level=0.9)
    reference = bootstrap(
        (a, b),
        cohen_kappa_score,
        paired=True,
        vectorized=False,
        method="percentile",
        confidence_level=0.9,
        n_resamples=1000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert found == pytest.approx(tuple(reference), abs=0.04)
    assert found[0] < error_consistency(a, b) < found[1]
    assert found == error_consistency_interval(a, b, level=0.9), "the same draws every time"


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Of 200 samples from two networks of known consistency, about nine in ten intervals hold it."""
    generator = np.random.default_rng(0)
    truth = error_consistency(*answers(100, 0.5, 0.1, 0.2))
    covered = 0
    for _ in range(200):
        drawn = generator.integers(0, 100, 300)
        a, b = (vector[drawn] for vector in answers(100, 0.5, 0.1, 0.2))
        low, high = error_consistency_interval(a, b, level=0.9, num_resamples=500)
        covered += low <= truth <= high
    assert 170 <= covered <= 192


def test_interval_of_networks_that_never_differ() -> None:
    assert error_consistency_interval([1, 0, 1], [1, 0, 1]) == (1.0, 1.0)
    assert error_consistency_interval([1], [0]) == (0.0, 0.0)


@given(st.integers(1, 12), st.data())
def test_bounds_are_the_extremes_over_all_arrangements(n: int, data: st.DataObject) -> None:
    num_a, num_b = data.draw(st.integers(0, n)), data.draw(st.integers(0, n))
    a = np.arange(n) < num_a
    reached = [error_consistency(a, np.roll(np.arange(n) < num_b, shift)) for shift in range(n)]
    low, high = error_consistency_bounds(num_a / n, num_b / n)
    assert (low, high) == pytest.approx((min(reached), max(reached)), abs=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: error_consistency_bounds(33.5, 0.2), "accuracy_a=33.5 must be a share from 0 to 1.*by 100"),
        (lambda: error_consistency_bounds(0.2, float("nan")), "accuracy_b=nan must be a share"),
        (lambda: error_consistency_interval([1], [1, 0]), "correct_a has 1 examples and correct_b 2"),
        (lambda: error_consistency_interval([1], [1], level=95), "level=95 must lie between 0 and 1"),
        (lambda: error_consistency_interval([1], [1], num_resamples=0), "num_resamples=0 must be at least 1"),
    ],
)
def test_interval_and_bounds_refuse_what_does_not_fit(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
