"""Value and gradient over ranks, micro-batches, weights and layouts, against the literal reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import CheckFailedError, Pool
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import SIMILARITIES as REFERENCES
from reference import cka, related_rows
from torch import Tensor

from scale_guide import linear_cka
from scale_guide.objective import Similarity, evaluate
from scale_guide.statistics import Padding, Pair, Statistics, Storage, Wires, count_bytes, make_plan, wires

LAYOUTS = ("gather", "transpose", "covariance")
SIMILARITIES = ("cka", "debiased_cka")


def shards(x: Tensor, num_processes: int, num_micro_batches: int, uneven: bool = False) -> list[list[Tensor]]:
    """Rows of each rank and micro-batch; with `uneven` the last rank gives up one row to the first."""
    sizes = [len(x) // num_processes] * num_processes
    if uneven and num_processes > 1:
        sizes[0], sizes[-1] = sizes[0] + 1, sizes[-1] - 1
    return [list(rows.tensor_split(num_micro_batches)) for rows in x.split(sizes)]


def one_step(
    group: Any,
    *,
    x: dict[str, Tensor],
    y: dict[str, Tensor],
    pairs: list[Pair],
    similarity: str,
    layout: str,
    k: int = 1,
    uneven: bool = False,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    guide_first: bool = False,
    storage: Storage = Storage(),  # noqa: B008 - frozen
) -> tuple[Tensor, dict[str, Tensor]]:
    """The guidance loss of one step and this rank's gradient by target layer, for its rows in order."""
    lines, measure = Wires(group), Similarity(similarity)
    widths = {("target", n): v.shape[1] for n, v in x.items()} | {("guide", n): v.shape[1] for n, v in y.items()}
    plan = make_plan(pairs, widths, len(next(iter(x.values()))), lines.size, measure.forms, layout)
    raw = {n: [part.detach() for part in shards(v, lines.size, k, uneven)[lines.rank]] for n, v in x.items()}
    own_x = {n: [measure.prepare(part.requires_grad_()) for part in v] for n, v in raw.items()}
    own_y = {n: [measure.prepare(part) for part in shards(v, lines.size, k, uneven)[lines.rank]] for n, v in y.items()}
    own_w = [None] * k if weights is None else shards(weights, lines.size, k, uneven)[lines.rank]
    own_mask = [None] * k if mask is None else shards(mask, lines.size, k, uneven)[lines.rank]
    statistics = Statistics(plan, lines, centre=measure.centre, storage=storage)
    for j in range(k):
        ours, theirs = {n: v[j] for n, v in own_x.items()}, {n: v[j] for n, v in own_y.items()}
        padding = None if mask is None else Padding(own_mask[j], frozenset(widths))
        if guide_first:
            statistics.add_guide(theirs, own_w[j], padding=padding)
            statistics.reduce_guide()
            statistics.add_target(ours, {} if layout != "covariance" else theirs, own_w[j], padding=padding)
        else:
            statistics.add(ours, theirs, own_w[j], padding=padding)
    outcome = evaluate(statistics.reduce(), measure, pairs, weight=2.0)
    statistics.send_back(outcome.gradients)
    gradients = {}
    for name, value in own_x.items():
        guide = [{n: v[j] for n, v in own_y.items()} for j in range(k)]
        parts = [statistics.rows_gradient(j, name, value[j], guide[j], own_w[j]) for j in range(k)]
        raw_parts = [torch.autograd.grad(value[j], raw[name][j], parts[j].to(value[j].dtype))[0] for j in range(k)]
        gradients[name] = torch.cat(raw_parts)
    return outcome.loss, gradients


def check_against_reference(pool: Pool, world_size: int, tolerance: float = 1e-10, **case: Any) -> None:
    results = pool.run(one_step, world_size, **case)
    valid = slice(None) if case.get("weights") is None else case["weights"] > 0
    leaves = {name: value.double().clone().requires_grad_() for name, value in case["x"].items()}
    reference = REFERENCES[case["similarity"]]
    expected = sum(
        2.0 * p.weight * (1 - reference(leaves[p.target][valid], case["y"][p.guide][valid])) for p in case["pairs"]
    )
    expected.backward()
    for loss, _ in results:
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=tolerance, atol=tolerance)
    for name, leaf in leaves.items():
        # The engine averages over ranks: the sum of the ranks' gradients divided by W must be the true one.
        gathered = torch.cat([gradients[name] for _, gradients in results]) / world_size
        scale = leaf.grad.abs().max()
        torch.testing.assert_close(gathered.double() / scale, leaf.grad / scale, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_value_and_gradient_equal_one_process(pool: Pool, world_size: int, similarity: str, layout: str) -> None:
    x, y = related_rows(24, 10, 7, mean=3.0)
    pairs = [Pair("x", "y", 1.5)]
    case = {"x": {"x": x}, "y": {"y": y}, "pairs": pairs, "similarity": similarity, "layout": layout}
    check_against_reference(pool, world_size, **case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_micro_batches_uneven_ranks_and_weights(pool: Pool, similarity: str, layout: str) -> None:
    x, y = related_rows(24, 10, 7, mean=-2.0)
    weights = torch.ones(24)
    weights[[0, 5, 6, 7, 20]] = 0
    x[weights == 0] = 1e6
    case = {"x": {"x": x}, "y": {"y": y}, "pairs": [Pair("x", "y")], "similarity": similarity, "layout": layout}
    for world_size, k in ((1, 3), (2, 2), (3, 3), (4, 1)):
        check_against_reference(pool, world_size, k=k, uneven=True, weights=weights, tolerance=1e-8, **case)


def test_a_rank_whose_rows_all_have_weight_zero(pool: Pool) -> None:
    x, y = related_rows(24, 10, 7)
    weights = torch.cat([torch.zeros(12), torch.ones(12)])
    for layout in LAYOUTS:
        case = {"x": {"x": x}, "y": {"y": y}, "pairs": [Pair("x", "y")], "similarity": "cka", "layout": layout}
        check_against_reference(pool, 2, k=2, weights=weights, **case)


@pytest.mark.parametrize("layout", [*LAYOUTS, "auto"])
def test_a_graph_of_shared_layers(pool: Pool, layout: str) -> None:
    x1, y1 = related_rows(24, 6, 9, seed=1)
    x2, y2 = related_rows(24, 200, 300, seed=2)
    pairs = [Pair("x1", "y1"), Pair("x1", "y2", 0.5), Pair("x2", "y2", 2.0), Pair("x3", "y3")]
    x = {"x1": x1, "x2": x2, "x3": x2 + 1}
    y = {"y1": y1, "y2": y2, "y3": y1 * 2}
    for similarity in SIMILARITIES:
        check_against_reference(pool, 3, x=x, y=y, pairs=pairs, similarity=similarity, layout=layout)


def linear_cka_step(group: Any, *, x: Tensor, y: Tensor, layout: str) -> tuple[Tensor, Tensor, int]:
    lines = Wires(group)
    x = x.tensor_split(lines.size)[lines.rank].clone().requires_grad_()
    with count_bytes() as sent:
        value = linear_cka(x, y.tensor_split(lines.size)[lines.rank], layout=layout, group=group)
    before = sent.num_bytes
    value.backward()
    assert sent.num_bytes == before, "backward must not communicate"
    return value.detach(), x.grad, sent.num_bytes


@pytest.mark.parametrize("layout", [*LAYOUTS, "auto"])
def test_linear_cka_with_fp32_rows_and_fp16_guide(pool: Pool, layout: str) -> None:
    x, y = related_rows(32, 20, 30)
    x, y = x.float(), y.half()
    results = pool.run(linear_cka_step, 4, x=x, y=y, layout=layout)
    leaf = x.double().requires_grad_()
    expected = cka(leaf, y.double())
    expected.backward()
    for value, _, _ in results:
        assert float(value) == pytest.approx(float(expected.detach()), abs=1e-6)
    gathered = torch.cat([gradient for _, gradient, _ in results]) / 4
    torch.testing.assert_close(gathered.double(), leaf.grad, rtol=1e-4, atol=1e-5 * float(leaf.grad.abs().max()))


def test_guide_rows_travel_in_their_own_dtype(pool: Pool) -> None:
    x, y = related_rows(32, 8, 4096)
    whole = pool.run(linear_cka_step, 2, x=x.float(), y=y.float(), layout="transpose")[0][2]
    half = pool.run(linear_cka_step, 2, x=x.float(), y=y.half(), layout="transpose")[0][2]
    assert whole - half == 16 * 4096 * 2


def small_buckets(group: Any, **case: Any) -> tuple[Tensor, dict[str, Tensor]]:
    wires.BUCKET_BYTES, before = 1000, wires.BUCKET_BYTES
    try:
        return one_step(group, **case)
    finally:
        wires.BUCKET_BYTES = before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_buckets_change_nothing(pool: Pool, layout: str) -> None:
    x, y = related_rows(24, 50, 31)
    pairs = [Pair("a", "c"), Pair("b", "c"), Pair("b", "d")]
    case = {"x": {"a": x, "b": x[:, :20] - 1}, "y": {"c": y, "d": y[:, :9]}, "similarity": "cka", "layout": layout}
    whole, bucketed = (pool.run(check, 3, pairs=pairs, **case) for check in (one_step, small_buckets))
    for (loss, gradients), (other_loss, other_gradients) in zip(whole, bucketed, strict=True):
        torch.testing.assert_close(loss, other_loss, rtol=1e-12, atol=0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, other_gradients[name], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("n", [1, 2, 511, 512, 513, 1300])
def test_packing_a_symmetric_matrix(n: int) -> None:
    matrix = torch.randn(n, n)
    matrix = matrix + matrix.T
    packed, back = wires.pack_symmetric(matrix), torch.full((n, n), float("nan"))
    assert packed.numel() <= n * (n + 512) / 2 + 512
    wires.unpack_symmetric(packed, back)
    assert torch.equal(matrix, back)


def test_without_any_process_group() -> None:
    x, y = related_rows(12, 5, 6)
    for layout in LAYOUTS:
        for estimator in ("biased", "debiased"):
            value = linear_cka(x, y, estimator=estimator, layout=layout)
            assert float(value) == pytest.approx(float(cka(x, y, estimator)), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(4, 40),
    p=st.integers(1, 30),
    q=st.integers(1, 30),
    k=st.integers(1, 4),
    layout=st.sampled_from(LAYOUTS),
    similarity=st.sampled_from(SIMILARITIES),
    seed=st.integers(0, 1000),
)
def test_any_shape_in_one_process(n: int, p: int, q: int, k: int, layout: str, similarity: str, seed: int) -> None:
    x, y = related_rows(n, p, q, seed=seed, mean=float(seed % 7))
    leaf = x.clone().requires_grad_()
    expected = 2.0 * (1 - REFERENCES[similarity](leaf, y))
    if not expected.isfinite() or (n == 4 and similarity == "debiased_cka"):
        return  # the unbiased estimate of a variance may be negative at so few rows
    expected.backward()
    case = {"x": {"x": x}, "y": {"y": y}, "pairs": [Pair("x", "y")], "similarity": similarity, "layout": layout}
    loss, gradients = one_step(None, k=k, **case)
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-7, abs=1e-9)
    scale = max(float(leaf.grad.abs().max()), 1e-9)
    torch.testing.assert_close(gradients["x"] / scale, leaf.grad / scale, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_closed_form_gradient(layout: str) -> None:
    """dX = -2c (Y C'/hxy - X A/hxx), DESIGN 3."""
    x, y = related_rows(20, 6, 9)
    _, gradients = one_step(None, x={"x": x}, y={"y": y}, pairs=[Pair("x", "y")], similarity="cka", layout=layout)
    x, y = x - x.mean(0), y - y.mean(0)
    a, c, d = x.T @ x, x.T @ y, y.T @ y
    hxy, hxx = c.square().sum(), a.square().sum()
    value = hxy / (hxx * d.square().sum()).sqrt()
    torch.testing.assert_close(gradients["x"], 2.0 * -2 * value * (y @ c.T / hxy - x @ a / hxx))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_far_from_zero_in_fp32(pool: Pool, layout: str, similarity: str) -> None:
    x, y = related_rows(256, 16, 24, mean=2236.0)  # |mean| / std = 1,000
    x, y = x.float(), y.float()
    case = {"x": {"x": x}, "y": {"y": y}, "pairs": [Pair("x", "y")], "similarity": similarity, "layout": layout}
    check_against_reference(pool, 2, k=2, tolerance=2e-5, **case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("constant", [0.0, 0.1, 12345.678])
def test_a_layer_without_spread_gives_zero_and_no_gradient(layout: str, similarity: str, constant: float) -> None:
    x, y = (rows.float() for rows in related_rows(16, 5, 7))
    flat = torch.full_like(x, constant)
    both = {"pairs": [Pair("x", "y")], "similarity": similarity, "layout": layout}
    loss, gradients = one_step(None, x={"x": flat}, y={"y": y}, **both)
    assert float(loss) == 2.0
    assert not gradients["x"].any()
    loss, gradients = one_step(None, x={"x": x}, y={"y": torch.full_like(y, constant)}, **both)
    assert float(loss) == 2.0
    assert not gradients["x"].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_extremes_of_scale(layout: str) -> None:
    x, y = related_rows(16, 5, 7)
    expected = float(cka(x, y))
    for scale in (1e-12, 1e9):
        value = linear_cka((x * scale).float(), (y / scale).float(), layout=layout)
        assert float(value) == pytest.approx(expected, abs=1e-5)
    half = (y * 6e4 / y.abs().max()).half()
    assert float(linear_cka(x.float(), half, layout=layout)) == pytest.approx(float(cka(x, half)), abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_never_hidden(layout: str, bad: float) -> None:
    x, y = (rows.float() for rows in related_rows(16, 5, 7))
    x[3, 2] = bad
    assert linear_cka(x, y, layout=layout).isnan()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast_does_not_reach_the_products(layout: str) -> None:
    x, y = (rows.float() for rows in related_rows(64, 5, 7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = linear_cka(x, y, layout=layout)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(cka(x, y)), abs=1e-6)


def test_invariances() -> None:
    x, y = related_rows(30, 6, 9)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    order = torch.randperm(30)
    for estimator in ("biased", "debiased"):
        value = float(linear_cka(x, y, estimator=estimator))
        for same in (x @ rotation, 7 * x, x + 5):
            assert float(linear_cka(same, y, estimator=estimator)) == pytest.approx(value, abs=1e-12)
        assert float(linear_cka(x[order], y[order], estimator=estimator)) == pytest.approx(value, abs=1e-12)
        assert float(linear_cka(x, x @ rotation, estimator=estimator)) == pytest.approx(1.0, abs=1e-12)


def too_few(group: Any, *, layout: str) -> None:
    linear_cka(torch.randn(1, 3), torch.randn(1, 2), layout=layout, group=group)


def other_widths(group: Any, *, layout: str) -> None:
    linear_cka(torch.randn(8, 3 + Wires(group).rank), torch.randn(8, 2), layout=layout, group=group)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("check", "message"), [(too_few, "at least 4"), (other_widths, "different layers, widths")])
def test_errors_come_on_every_rank_and_nobody_hangs(pool: Pool, check: Any, message: str, layout: str) -> None:
    with pytest.raises(CheckFailedError) as failure:
        pool.run(check, 3, layout=layout)
    for error in failure.value.errors:
        assert error is not None
        assert error[0] == "ValueError"
        assert message in error[1]


def test_bad_calls() -> None:
    x, y = related_rows(8, 3, 2)
    with pytest.raises(ValueError, match=r"8 rows but the guide layer 'y' has 7"):
        linear_cka(x, y[:7])
    with pytest.raises(ValueError, match="did you mean 'debiased'"):
        linear_cka(x, y, estimator="debiasd")
    with pytest.raises(ValueError, match=r"rows x \[b, p\]"):
        linear_cka(x[0], y)
    with pytest.raises(ValueError, match="Known: auto, gather"):
        linear_cka(x, y, layout="ring")


def test_double_backward_raises() -> None:
    x, y = related_rows(8, 3, 2)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(linear_cka(x, y), x, create_graph=True)
