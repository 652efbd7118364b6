"""error_consistency against scikit-learn's Cohen's kappa, its limits and its refusals."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from scale_guide.analysis.error_consistency import error_consistency

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
