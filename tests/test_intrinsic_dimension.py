"""TwoNN against a literal computation, and on rows whose dimension is known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scale_guide.analysis.intrinsic_dimension import MAX_BYTES, Points, two_nn
from scale_guide.engine import Engine
from scale_guide.rows import Selected


def literal(rows: Tensor) -> float:
    """The slope through the origin of -log(1 - F) over log mu, without the largest tenth (Facco et al. 2017)."""
    ratios = []
    for i in range(len(rows)):
        distances = sorted(math.dist(rows[i].tolist(), rows[j].tolist()) for j in range(len(rows)) if j != i)
        if distances[0] > 0:
            ratios.append(distances[1] / distances[0])
    ratios.sort()
    kept = ratios[: int(0.9 * len(ratios))]
    points = [(math.log(mu), -math.log(1 - (i + 1) / len(ratios))) for i, mu in enumerate(kept)]
    return sum(x * y for x, y in points) / sum(x * x for x, _ in points)


def uniform(n: int, dimension: int, columns: int, seed: int = 0) -> Tensor:
    """Rows even over a cube of `dimension` axes, laid into `columns` dimensions."""
    generator = torch.Generator().manual_seed(seed)
    cube = torch.rand(n, dimension, generator=generator, dtype=torch.float64)
    return cube @ torch.linalg.qr(torch.randn(columns, dimension, generator=generator, dtype=torch.float64))[0].T


@given(st.integers(20, 40), st.integers(1, 6), st.integers(0, 10**6))
def test_agrees_with_a_literal_computation(n: int, columns: int, seed: int) -> None:
    rows = torch.randn(n, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert two_nn(rows) == pytest.approx(literal(rows), rel=1e-6)


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_known_dimensions(dimension: int) -> None:
    assert two_nn(uniform(2000, dimension, 50)) == pytest.approx(dimension, rel=0.1)


def test_shift_and_scale_change_nothing() -> None:
    rows = uniform(300, 3, 10_000)
    expected = two_nn(rows)
    for changed in (1e6 * rows, rows / 1e6, 10 * (rows + 5).float()):
        assert two_nn(changed) == pytest.approx(expected, rel=0.02)


def test_copies_are_left_out() -> None:
    rows = uniform(200, 2, 8)
    assert two_nn(torch.cat([rows, rows[:20]])) == pytest.approx(2, rel=0.25)


@pytest.mark.parametrize("rows", [torch.ones(10, 3), torch.rand(2, 3), torch.zeros(0, 3), torch.eye(2).repeat(5, 1)])
def test_no_dimension(rows: Tensor) -> None:
    assert math.isnan(two_nn(rows))


def test_as_many_rows_are_kept_as_memory_holds() -> None:
    assert Points.within_memory(1000, 10).num_points == 1000
    assert Points.within_memory(1000, 10**7).num_points == MAX_BYTES // (4 * 10**7)
    rows, points = uniform(60, 2, 4), Points(50)
    for positions in torch.arange(60).split(8):
        points.keep("network", {"layer": Selected(rows[positions], None)}, positions)
    assert points.dimension("network", "layer", Engine()) == pytest.approx(two_nn(rows[:50]))
    assert math.isnan(points.dimension("network", "layer", Engine())), "what was used is dropped"
