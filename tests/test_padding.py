"""Padded sequences, kept rows, and the guide's half first: other ways through the statistics to the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import CheckFailedError, Pool
from reference import SIMILARITIES as REFERENCES
from reference import related_rows
from test_statistics import SIMILARITIES, check_against_reference, one_step
from torch import Tensor

from scale_guide.rows import select
from scale_guide.statistics import Pair, Storage

N, LENGTH = 24, 5
GRAM_LAYOUTS = ("gather", "transpose")


def lengths_mask() -> Tensor:
    """Sequences of 1 to 5 real positions; the last position is real in a few rows only."""
    lengths = torch.arange(N) % LENGTH + 1
    return torch.arange(LENGTH) < lengths[:, None]


def fill(x: Tensor, mask: Tensor) -> Tensor:
    """Rows [N, T * d] with padding set to the mean of the column's real entries, one column at a time."""
    real = mask.repeat_interleave(x.shape[1] // LENGTH, dim=1)
    columns = []
    for column, counts in zip(x.T, real.T, strict=True):
        mean = column[counts].mean() if counts.any() else column.new_zeros(())
        columns.append(torch.where(counts, column, mean))
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("layout", GRAM_LAYOUTS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(("world_size", "k"), [(1, 1), (1, 3), (2, 2), (3, 1), (4, 1)])
def test_padding_takes_the_mean_of_its_column(
    pool: Pool, world_size: int, k: int, similarity: str, layout: str
) -> None:
    x, y = related_rows(N, 3 * LENGTH, 2 * LENGTH, mean=2.0)
    mask = lengths_mask()
    weights = torch.ones(N)
    weights[[3, 11]] = 0
    leaf = x.clone().requires_grad_()
    valid = weights > 0
    expected = 2 * (1 - REFERENCES[similarity](fill(leaf[valid], mask[valid]), fill(y[valid], mask[valid])))
    expected.backward()
    real = {name: select(v.view(N, LENGTH, -1), "flatten", mask=mask).rows for name, v in (("x", x), ("y", y))}
    results = pool.run(
        one_step,
        world_size,
        x={"x": real["x"]},
        y={"y": real["y"]},
        pairs=[Pair("x", "y")],
        similarity=similarity,
        layout=layout,
        k=k,
        uneven=True,
        weights=weights,
        mask=mask,
    )
    for loss, _ in results:
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-10)
    gathered = torch.cat([gradients["x"] for _, gradients in results]) / world_size
    torch.testing.assert_close(gathered, leaf.grad, rtol=1e-8, atol=1e-10)
    assert float(leaf.grad.abs().max()) > 1e-3


def test_what_stands_in_the_padding_does_not_matter(pool: Pool) -> None:
    x, y = related_rows(N, 3 * LENGTH, 2 * LENGTH)
    mask = lengths_mask()
    losses = []
    for junk in (0.0, float("nan")):
        filled = x.view(N, LENGTH, 3).masked_fill(~mask[..., None], junk)
        case = {"x": {"x": select(filled, "flatten", mask=mask).rows}, "y": {"y": y}, "mask": mask}
        losses += pool.run(one_step, 2, **case, pairs=[Pair("x", "y")], similarity="cka", layout="transpose")
    assert len({float(loss) for loss, _ in losses}) == 1
    assert losses[0][0].isfinite()


def test_covariance_refuses_padding(pool: Pool) -> None:
    x, y = related_rows(N, 3 * LENGTH, 2 * LENGTH)
    case: dict[str, Any] = {"x": {"x": x}, "y": {"y": y}, "pairs": [Pair("x", "y")], "mask": lengths_mask()}
    with pytest.raises(CheckFailedError) as caught:
        pool.run(one_step, 2, **case, similarity="cka", layout="covariance")
    assert all(
        error and error[0] == "ValueError" and "rows token, mean or last" in error[1] for error in caught.value.errors
    )


@pytest.mark.parametrize("layout", [*GRAM_LAYOUTS, "covariance"])
def test_the_guide_first_gives_the_same(pool: Pool, layout: str) -> None:
    x, y = related_rows(N, 10, 7, mean=3.0)
    weights = torch.ones(N)
    weights[5] = 0
    case: dict[str, Any] = {"x": {"x": x}, "y": {"y": y}, "pairs": [Pair("x", "y")], "layout": layout}
    case["similarity"] = "debiased_cka"
    for world_size in (1, 2, 3):
        check_against_reference(
            pool, world_size, guide_first=True, uneven=True, weights=weights, tolerance=1e-8, **case
        )


@pytest.mark.parametrize("layout", GRAM_LAYOUTS)
def test_kept_rows_are_exact_in_their_own_format_and_close_in_bf16(pool: Pool, layout: str) -> None:
    x, y = related_rows(N, 40, 30, mean=1.0)
    case: dict[str, Any] = {"x": {"x": x}, "y": {"y": y}, "pairs": [Pair("x", "y")], "similarity": "cka", "k": 3}
    check_against_reference(pool, 2, storage=Storage(on_host=True), layout=layout, **case)
    exact = pool.run(one_step, 2, layout=layout, **case)
    rounded = pool.run(one_step, 2, storage=Storage(torch.bfloat16), layout=layout, **case)
    ours, theirs = (torch.cat([gradients["x"] for _, gradients in found]).double() for found in (exact, rounded))
    difference = (ours - theirs).norm() / ours.norm()
    assert 1e-5 < float(difference) < 2e-2
