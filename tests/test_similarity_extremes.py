"""Every similarity where numbers get difficult: no spread, few rows, equal rows, far from zero, fp16, huge and tiny.

In fp32 through the statistics of two micro-batches, against the literal float64 reference on the same fp32 rows.
"""

from __future__ import annotations

import pytest
import torch
from reference import SIMILARITIES as REFERENCES
from reference import related_rows
from test_similarity import FORMS, NAMES, OF_DIRECTIONS, rotation, value_of
from test_statistics import one_step
from torch import Tensor, nn

from scale_guide import Guidance
from scale_guide.objective import Similarity
from scale_guide.similarity import _rows
from scale_guide.statistics import Pair

LAYOUT = {"gram": "gather", "feature": "covariance"}


def through_statistics(name: str, form: str, x: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """The similarity and its gradient at the rows x, in the precision of the rows."""
    case = {"x": {"x": x}, "y": {"y": y}, "pairs": [Pair("x", "y")], "similarity": name, "layout": LAYOUT[form]}
    loss, gradients = one_step(None, k=2, **case)
    return 1 - float(loss) / 2, gradients["x"].double() / -2


def check(name: str, form: str, x: Tensor, y: Tensor, *, value: float, gradient: float) -> None:
    """Holds similarity and gradient (relative to its largest entry) to the reference within these errors."""
    ours, our_gradient = through_statistics(name, form, x, y)
    leaf = x.double().requires_grad_()
    expected = REFERENCES[name](leaf, y.double())
    expected.backward()
    assert ours == pytest.approx(float(expected.detach()), abs=value)
    scale = leaf.grad.abs().max()
    torch.testing.assert_close(our_gradient / scale, leaf.grad / scale, rtol=0, atol=gradient)


@pytest.mark.parametrize("constant", [0.0, 0.1, -12345.678, 1e-20])
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_layer_without_spread_gives_zero_and_no_gradient(name: str, form: str, constant: float) -> None:
    x, y = (rows.float() for rows in related_rows(16, 5, 7))
    flat = torch.full((16, 6), constant)
    for a, b in ((flat, y), (x, flat), (flat, flat)):
        value, gradient = through_statistics(name, form, a, b)
        assert value == 0
        assert not gradient.any()


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_rows_of_one_direction_have_no_spread_but_in_length(name: str, form: str) -> None:
    direction, (_, y) = torch.tensor([0.3, -2.0, 0.7]), related_rows(16, 5, 7)
    value, gradient = through_statistics(name, form, torch.linspace(0.5, 3, 16)[:, None] * direction, y.float())
    assert (value == 0) == (name in OF_DIRECTIONS)
    assert gradient.isfinite().all()
    if name in OF_DIRECTIONS:
        assert not gradient.any()


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_four_rows(name: str, form: str) -> None:
    x, y = related_rows(4, 16, 24)
    check(name, form, x.float(), y.float(), value=2e-6, gradient=1e-4)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_equal_rows_among_others(name: str, form: str) -> None:
    x, y = (rows.float() for rows in related_rows(24, 300, 7, mean=1.0))
    x[5], x[17], y[20] = x[4], x[2], y[21]
    with torch.autograd.set_detect_anomaly(True):  # not a NaN on the way, either
        value, gradient = through_statistics(name, form, x, y)
    assert value == pytest.approx(float(REFERENCES[name](x.double(), y.double())), abs=2e-6)
    # Not the reference's gradient: its square root has none at 0. The definition of the package in float64, instead.
    _, expected = through_statistics(name, form, x.double(), y.double())
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("ulps", [-3, -1, 1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_equal_rows_whose_products_were_rounded_apart(name: str, ulps: int) -> None:
    """A matrix product may add up x_4 x_5 in another order than x_4 x_4, although the rows are the same."""
    x, y = related_rows(24, 300, 7)
    x[5] = x[4]
    measure = Similarity(name)
    x, y = (rows - rows.mean(0) for rows in (measure.prepare(x), measure.prepare(y)))
    K, L = (x @ x.T).float(), (y @ y.T).float()
    exact = K.double().requires_grad_()
    expected = measure.module.gram(exact, L.double())
    expected.backward()
    K[4, 5] = K[5, 4] = K[4, 4] * (1 + ulps * torch.finfo(torch.float32).eps)
    K.requires_grad_()
    value = measure.module.gram(K, L)
    value.backward()
    assert float(value.detach()) == pytest.approx(float(expected.detach()), abs=2e-6)
    torch.testing.assert_close(K.grad.double(), exact.grad, rtol=0, atol=1e-3 * float(exact.grad.abs().max()))


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_rows_all_equally_far_apart(name: str, form: str) -> None:
    """A simplex: a row has no near and no far neighbours, in any measure that asks for distances alone."""
    simplex, (_, y) = rotation(16), related_rows(16, 5, 7)
    for x in (simplex.float(), simplex):
        value, gradient = through_statistics(name, form, x, y.to(x.dtype))
        assert gradient.isfinite().all()
        assert (value == 0) == (name in ("rsa_cosine", "rsa_euclidean", "mutual_knn"))
        assert value != 0 or not gradient.any()


@pytest.mark.parametrize("name", NAMES)
def test_all_rows_of_two_kinds(name: str) -> None:
    """More than half of all pairs coincide: rbf_cka has no median distance, mutual_knn only ties."""
    _, y = related_rows(16, 5, 7)
    x = torch.tensor([[1.0, 2.0, 0.5], [0.3, -1.0, 4.0]]).repeat_interleave(torch.tensor([13, 3]), dim=0)
    value, gradient = through_statistics(name, "gram", x, y.float())
    assert -1 <= value <= 1
    assert gradient.isfinite().all()
    if name == "rbf_cka":
        assert value == 0
        assert not gradient.any()


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_far_from_zero(name: str, form: str) -> None:
    x, y = related_rows(64, 16, 24, mean=2236.0)  # |mean| / std = 1,000
    check(name, form, x.float(), y.float(), value=5e-6, gradient=1e-3)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_guide_rows_at_the_edge_of_fp16(name: str, form: str) -> None:
    x, y = related_rows(64, 16, 24)
    half = (y * 65504 / y.abs().max()).half()
    assert float(half.abs().max()) == 65504
    check(name, form, x.float(), half, value=2e-6, gradient=1e-4)


# Beyond these the sums of squares (Gram matrices) or of fourth powers (norms) leave fp32.
SCALES = {"gram": (1e-15, 1e-9, 1e9, 1e15), "feature": (1e-8, 1e8)}


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_rows_of_any_scale(name: str, form: str) -> None:
    x, y = related_rows(64, 16, 24)
    for scale in SCALES[form]:
        check(name, form, (x * scale).float(), y.float(), value=2e-6, gradient=1e-4)
    if name in OF_DIRECTIONS:
        for scale in (1e-30, 1e-20, 1e20, 1e30):
            check(name, form, (x * scale).float(), y.float(), value=2e-6, gradient=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-12, 1e12, 1e20, 1e30])
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_scales_that_fp32_cannot_square_are_right_or_not_a_number(name: str, form: str, scale: float) -> None:
    x, y = related_rows(64, 16, 24)
    x, y = (x * scale).float(), y.float()
    for a, b in ((x, y), (y, x)):
        value, _ = through_statistics(name, form, a, b)
        without_spread = value == 0 and scale < 1e-29  # squares of 1e-30 are 0
        assert value != value or without_spread or value == pytest.approx(float(REFERENCES[name](a, b)), abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_never_hidden(name: str, bad: float) -> None:
    x, y = (rows.float() for rows in related_rows(16, 5, 7))
    x[3, 2] = bad
    for form in sorted(Similarity(name).forms):
        for a, b in ((x, y), (y, x)):
            value, _ = through_statistics(name, form, a, b)
            assert value != value


@pytest.mark.parametrize("name", NAMES)
def test_guidance_says_that_a_similarity_is_not_a_number(name: str) -> None:
    target, guide = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Sequential(nn.Linear(6, 5), nn.Tanh())
    with torch.no_grad():
        target[0].weight[:] = 3e38
    guidance = Guidance(target, guide, pairs=[Pair("0", "0")], similarity=name)
    with guidance.record():
        guidance.run_guide(torch.randn(16, 6))
        target(torch.full((16, 6), 9.0))
    guidance.loss()
    with pytest.raises(ValueError, match=r"The similarity of 0 <- 0 is not a number: .* optimizer\.clip_norm"):
        _ = guidance.last


def test_unit_rows() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-40, 0.0], [3e-30, -4e-30], [3e25, 4e25]], requires_grad=True)
    unit = _rows.unit(rows)
    expected = torch.tensor([[0.6, 0.8], [0, 0], [0, 0], [0.6, -0.8], [0.6, 0.8]])
    torch.testing.assert_close(unit, expected)
    unit[:, 0].sum().backward()
    assert rows.grad.isfinite().all()
    assert not rows.grad[1:3].any()
    torch.testing.assert_close(rows.grad[3], torch.tensor([0.64, 0.48]) / 5e-30)
    half = torch.tensor([[65504.0, 65504.0]], dtype=torch.float16)
    assert _rows.unit(half).dtype == torch.float32
    torch.testing.assert_close(_rows.unit(half), torch.full((1, 2), 0.5**0.5))
    assert _rows.unit(torch.ones(1, 2, dtype=torch.float64)).dtype == torch.float64
    for bad in (float("nan"), float("inf")):
        assert _rows.unit(torch.tensor([[1.0, bad]])).isnan().any()


def test_gradients_of_unit_rows() -> None:
    rows, _ = related_rows(4, 3, 2)
    assert torch.autograd.gradcheck(_rows.unit, (rows * 1e3).requires_grad_())


def test_large_batches_in_fp32() -> None:
    """The rounding errors of hundreds of rows of low rank must not add up to a similarity, as roots of them would."""
    x, y = related_rows(512, 40, 60)
    for name in NAMES:
        leaf, exact = x.float().requires_grad_(), x.clone().requires_grad_()
        value, expected = value_of(name, leaf, y.float()), value_of(name, exact, y)
        value.backward()
        expected.backward()
        assert float(value.detach()) == pytest.approx(float(expected.detach()), abs=2e-6)
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=0, atol=1e-3 * float(exact.grad.abs().max()))
