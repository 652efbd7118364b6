"""The effective dimension is right where the sample's own is not, and the rows it asks for are the rows it takes."""

from __future__ import annotations

import math

import pytest
import torch
from reference import cka, unbiased_hsic
from torch import Tensor

from scale_guide.analysis.effective_dimension import FLOOR, effective_dimension, rows_needed
from scale_guide.statistics import Layout, Matrices, Pair, Statistics, Wires, make_plan


def spectrum(kind: str) -> Tensor:
    """Standard deviations along the axes."""
    if kind == "white":
        return torch.ones(500, dtype=torch.float64)
    if kind == "falling":
        return torch.arange(1, 401, dtype=torch.float64) ** -0.25
    return torch.tensor([5.0, 1.0, 1.0, 0.2], dtype=torch.float64)


def true_dimension(deviations: Tensor) -> float:
    variances = deviations.square()
    return float(variances.sum().square() / variances.square().sum())


def matrices_of(rows: Tensor, layout: Layout) -> Matrices:
    plan = make_plan(
        [Pair("x", "y")],
        {("target", "x"): rows.shape[1], ("guide", "y"): 2},
        len(rows),
        1,
        {"gram", "feature"},
        layout,
    )
    statistics = Statistics(plan, Wires(None))
    statistics.add({"x": rows}, {"y": rows[:, :2]})
    return statistics.reduce()


def gaussian(num_rows: int, deviations: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, len(deviations), dtype=torch.float64, generator=generator) * deviations + 7


@pytest.mark.parametrize("layout", ["gather", "covariance"])
@pytest.mark.parametrize(
    ("kind", "num_rows", "tolerance"), [("white", 256, 0.05), ("falling", 64, 0.15), ("few", 1024, 0.15)]
)
def test_it_is_right_where_the_plain_one_is_not(kind: str, num_rows: int, tolerance: float, layout: Layout) -> None:
    deviations = spectrum(kind)
    true = true_dimension(deviations)
    rows = gaussian(num_rows, deviations, seed=0).float()
    found = effective_dimension(matrices_of(rows, layout), ("target", "x"))
    assert found == pytest.approx(true, rel=tolerance)
    centred = rows.double() - rows.double().mean(0)
    plain = float((centred @ centred.T).trace().square() / (centred @ centred.T).square().sum())
    if kind != "few":
        assert plain < min(num_rows - 1, 0.5 * true), "the plain estimate cannot exceed N - 1, and is biased low"
    literal = (centred.square().sum() / (num_rows - 1)).square() / unbiased_hsic(
        centred @ centred.T, centred @ centred.T
    )
    assert found == pytest.approx(float(literal), rel=1e-4)


def test_the_estimate_below_the_line_has_no_bias() -> None:
    """The mean of tr(S^2) over 2,000 draws of 8 rows is the true one; the plain estimate is seven times as large."""
    deviations = spectrum("white")[:50]
    found = [matrices_of(gaussian(8, deviations, seed), "gather") for seed in range(2000)]
    unbiased, plain = [], []
    for matrices in found:
        trace = matrices.grams["target", "x"].trace() / 7
        unbiased.append(float(trace.square() / effective_dimension(matrices, ("target", "x"))))
        plain.append(float(matrices.grams["target", "x"].square().sum()) / 49)
    values = torch.tensor(unbiased, dtype=torch.float64)
    assert abs(float(values.mean()) - 50) < 4 * float(values.std()) / math.sqrt(2000)
    assert sum(plain) / 2000 > 6 * 50


def test_layers_without_spread_and_with_too_few_rows() -> None:
    flat = torch.full((16, 3), 5.0)
    assert effective_dimension(matrices_of(flat, "gather"), ("target", "x")) == 0
    assert effective_dimension(matrices_of(flat, "covariance"), ("target", "x")) == 0
    # Four rows as far apart as can be: nothing says that they have any direction in common.
    assert effective_dimension(matrices_of(torch.eye(4), "gather"), ("target", "x")) == math.inf


@pytest.mark.parametrize(("p", "q"), [(20, 20), (60, 5), (4, 30)])
def test_rows_needed_are_the_rows_it_takes(p: int, q: int) -> None:
    """Unrelated Gaussian rows: with so many their CKA is below the floor in the mean, with 0.8 times as many above."""
    needed = rows_needed(p, q)
    assert needed == math.ceil(1 + 10 * math.sqrt(p * q))
    means = []
    for num_rows in (needed, round(0.8 * needed)):
        draws = [
            float(cka(gaussian(num_rows, torch.ones(p), 2 * seed), gaussian(num_rows, torch.ones(q), 2 * seed + 1)))
            for seed in range(40)
        ]
        means.append(sum(draws) / len(draws))
    assert means[0] < FLOOR < means[1]
