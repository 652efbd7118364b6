"""What every similarity promises: its value, its gradient, its two forms, and what it does not look at.

A new file of scale_guide/similarity is found here by itself; it needs a literal reference in reference.SIMILARITIES.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Pool
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import SIMILARITIES as REFERENCES
from reference import cka, related_rows
from test_statistics import LAYOUTS, check_against_reference, one_step
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scale_guide import Guidance, lookup
from scale_guide.objective import Similarity, companions
from scale_guide.similarity import _moments, mutual_knn, procrustes
from scale_guide.statistics import Matrices, Pair, Statistics, Wires, make_plan

NAMES = lookup.names("similarity")
WITH_FEATURE = [name for name in NAMES if "feature" in Similarity(name).forms]
# What reads the rows' directions alone: the length of each row is no matter, but where the origin lies is.
OF_DIRECTIONS = [name for name in NAMES if Similarity(name).rows == "unit_centre"]
FORMS = [(name, form) for name in NAMES for form in sorted(Similarity(name).forms)]
BY_LAYOUT = [(name, layout) for name in NAMES for layout in LAYOUTS if layout != "covariance" or name in WITH_FEATURE]


def prepared(measure: Similarity, rows: Tensor) -> Tensor:
    rows = measure.prepare(rows)
    return rows - rows.mean(0) if measure.centre else rows


def norms_of(x: Tensor, y: Tensor) -> _moments.Norms:
    a, b = x.square().sum(1), y.square().sum(1)
    return _moments.Norms(len(x), a @ b, a @ a, b @ b)


def value_of(name: str, x: Tensor, y: Tensor, form: str = "gram") -> Tensor:
    """The similarity of rows x [n, p] and y [n, q] in one process, by plain autograd."""
    measure = Similarity(name)
    x, y = prepared(measure, x), prepared(measure, y)
    if form == "gram":
        return measure.module.gram(x @ x.T, y @ y.T)
    extra = [norms_of(x, y)] * measure.needs_norms
    return measure.module.feature(x.T @ x, x.T @ y, y.T @ y, *extra)


def rotation(d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))[0]


def test_every_similarity_has_a_reference_and_is_named_in_the_help() -> None:
    assert set(REFERENCES) == set(NAMES)
    text = (lookup.PACKAGE / "config.py").read_text().split("similarity: str")[1].split('"""')[1]
    assert set(NAMES) <= set(text.replace(";", " ").split())


@pytest.mark.parametrize(("n", "p", "q"), [(5, 3, 2), (12, 5, 30), (12, 40, 7), (33, 6, 6)])
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_value_and_gradient_equal_the_reference(name: str, form: str, n: int, p: int, q: int) -> None:
    x, y = related_rows(n, p, q, seed=n, mean=1.0)
    leaf, expected_leaf = x.clone().requires_grad_(), x.clone().requires_grad_()
    value, expected = value_of(name, leaf, y, form), REFERENCES[name](expected_leaf, y)
    if expected.isnan():
        pytest.skip("the unbiased estimate of a variance is negative")
    value.backward()
    expected.backward()
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
    scale = expected_leaf.grad.abs().max()
    torch.testing.assert_close(leaf.grad / scale, expected_leaf.grad / scale, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_gradients_in_the_matrices(name: str, form: str) -> None:
    """By finite differences of the matrices themselves, K symmetric as it is."""
    measure = Similarity(name)
    x, y = (prepared(measure, rows) for rows in related_rows(9, 5, 4, seed=3, mean=0.5))
    if form == "gram":
        L = y @ y.T
        assert torch.autograd.gradcheck(lambda K: measure.module.gram((K + K.T) / 2, L), (x @ x.T).requires_grad_())
        return
    norms, D = norms_of(x, y), y.T @ y
    leaves = [(x.T @ x).requires_grad_(), (x.T @ y).requires_grad_()]
    if not measure.needs_norms:
        assert torch.autograd.gradcheck(lambda A, C: measure.module.feature((A + A.T) / 2, C, D), leaves)
        return
    leaves += [norms.product.requires_grad_(), norms.target_square.requires_grad_()]

    def with_norms(A: Tensor, C: Tensor, product: Tensor, square: Tensor) -> Tensor:
        changed = norms._replace(product=product, target_square=square)
        return measure.module.feature((A + A.T) / 2, C, D, changed)

    assert torch.autograd.gradcheck(with_norms, leaves)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_in_the_raw_rows(name: str) -> None:
    """By finite differences through preparation, matrices and measure."""
    x, y = related_rows(9, 5, 4, seed=4, mean=0.5)
    assert torch.autograd.gradcheck(lambda rows: value_of(name, rows, y), x.requires_grad_())


@pytest.mark.parametrize("name", NAMES)
def test_a_guide_matrix_that_asks_for_gradient_breaks_nothing(name: str) -> None:
    x, y = related_rows(10, 5, 4)
    measure = Similarity(name)
    K, L = (rows @ rows.T for rows in (prepared(measure, x), prepared(measure, y)))
    leaves = [K.clone().requires_grad_(), K.clone().requires_grad_()]
    measure.module.gram(leaves[0], L).backward()
    measure.module.gram(leaves[1], L.clone().requires_grad_()).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", WITH_FEATURE)
def test_the_two_forms_are_one_function(name: str) -> None:
    for seed, (n, p, q) in enumerate([(8, 5, 3), (20, 30, 4), (20, 4, 30)]):
        x, y = related_rows(n, p, q, seed=seed, mean=2.0)
        leaves = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        values = [value_of(name, leaf, y, form) for leaf, form in zip(leaves, ("gram", "feature"), strict=True)]
        for value in values:
            value.backward()
        torch.testing.assert_close(values[0], values[1], rtol=1e-9, atol=0)
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_what_no_similarity_looks_at(name: str, form: str) -> None:
    """The order of the rows, a rotation of either side's features, and the scale of either side."""
    x, y = related_rows(24, 6, 9, mean=1.0)
    value = float(value_of(name, x, y, form))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    for a, b in ((x[order], y[order]), (x @ rotation(6), y), (x, y @ rotation(9)), (x * 300, y), (x, y / 7)):
        assert float(value_of(name, a, b, form)) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_where_the_origin_lies_matters_to_directions_alone(name: str) -> None:
    x, y = related_rows(24, 6, 9, mean=1.0)
    value, moved = float(value_of(name, x, y)), float(value_of(name, x + 5, y - 3))
    assert (moved == pytest.approx(value, rel=1e-9)) == (name not in OF_DIRECTIONS)


@pytest.mark.parametrize("name", NAMES)
def test_the_length_of_each_row_matters_to_all_but_directions(name: str) -> None:
    x, y = related_rows(24, 6, 9, mean=1.0)
    lengths = torch.linspace(0.1, 9, 24, dtype=torch.float64)[:, None]
    value, stretched = float(value_of(name, x, y)), float(value_of(name, x * lengths, y))
    assert (stretched == pytest.approx(value, rel=1e-9)) == (name in OF_DIRECTIONS)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_one_for_equal_rows(name: str, form: str) -> None:
    x, y = related_rows(24, 6, 9, mean=1.0)
    same = float(value_of(name, x, 3 * x @ rotation(6), form))
    if name == "ridge":  # ridge shrinks
        assert 0.97 < same < 1
    else:
        assert same == pytest.approx(1, abs=1e-9)
    assert float(value_of(name, x, y, form)) < same


@pytest.mark.parametrize("name", NAMES)
def test_little_for_unrelated_rows(name: str) -> None:
    x, y = related_rows(300, 20, 30)
    shuffled = y[torch.randperm(300, generator=torch.Generator().manual_seed(1))]
    assert float(value_of(name, x, shuffled)) < 0.2 < 0.5 < float(value_of(name, x, y))


def test_soft_neighbours_become_the_metric_of_huh_et_al(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = related_rows(60, 6, 9)

    def nearest(rows: Tensor) -> list[set[int]]:
        unit = rows / rows.norm(dim=1, keepdim=True)
        similar = (unit @ unit.T).fill_diagonal_(-2)
        return [set(row.topk(10).indices.tolist()) for row in similar]

    hard = sum(len(a & b) for a, b in zip(nearest(x), nearest(y), strict=True)) / (10 * 60)
    assert float(value_of("mutual_knn", x, y)) == pytest.approx(hard, abs=0.1)
    monkeypatch.setattr(mutual_knn, "TEMPERATURE", 1e-6)
    assert float(value_of("mutual_knn", x, y)) == pytest.approx(hard, abs=1e-3)


def test_procrustes_of_equal_rows_lacks_what_lies_below_the_cut() -> None:
    spectrum = torch.tensor([1.0, 1e-1, 2e-3, 0.9e-3], dtype=torch.float64)  # shares of variance
    x = (rotation(16)[:, :4] - rotation(16)[:, :4].mean(0)) @ torch.eye(4, dtype=torch.float64)
    x = torch.linalg.qr(x)[0] * spectrum.sqrt()
    for form in ("gram", "feature"):
        value = float(value_of("procrustes", x, x, form))
        assert value == pytest.approx(1 - 0.9e-3 / float(spectrum.sum()), rel=1e-9)
    assert procrustes.CUT == 1e-6


@pytest.mark.parametrize(("name", "layout"), BY_LAYOUT)
@pytest.mark.parametrize(("world_size", "k"), [(1, 1), (1, 3), (2, 1), (2, 2), (3, 2)])
def test_ranks_and_micro_batches_change_nothing(pool: Pool, world_size: int, k: int, name: str, layout: str) -> None:
    x, y = related_rows(24, 10, 7, mean=-2.0)
    case = {"x": {"x": x}, "y": {"y": y}, "pairs": [Pair("x", "y", 1.5)], "similarity": name, "layout": layout}
    check_against_reference(pool, world_size, k=k, tolerance=1e-9, **case)
    weights = torch.ones(24)
    weights[[0, 5, 6, 7, 20]] = 0
    x[weights == 0] = 1e6
    check_against_reference(pool, world_size, k=k, uneven=True, weights=weights, tolerance=1e-8, **case)


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_of_shared_layers(pool: Pool, name: str) -> None:
    x, y = related_rows(18, 6, 9, seed=1)
    pairs = [Pair("a", "c"), Pair("a", "d", 0.5), Pair("b", "d", 2.0)]
    case = {"x": {"a": x, "b": x[:, :4] - 1}, "y": {"c": y, "d": y[:, :5] * 2}, "pairs": pairs}
    check_against_reference(pool, 2, similarity=name, layout="auto", k=2, tolerance=1e-9, **case)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(5, 16),
    p=st.integers(2, 20),
    q=st.integers(2, 20),
    rank=st.integers(2, 20),
    num_dropped=st.integers(0, 6),
    k=st.integers(1, 4),
    measure=st.sampled_from(BY_LAYOUT),
    seed=st.integers(0, 1000),
)
def test_any_shape_rank_and_weights(
    n: int, p: int, q: int, rank: int, num_dropped: int, k: int, measure: tuple[str, str], seed: int
) -> None:
    """Rows of any rank, some of them of weight 0, against the reference on the rows that count."""
    name, layout = measure
    generator = torch.Generator().manual_seed(seed)
    total = n + num_dropped
    x = torch.randn(total, min(rank, p), dtype=torch.float64, generator=generator) @ rotation(p, seed)[: min(rank, p)]
    y = torch.randn(total, q, dtype=torch.float64, generator=generator) + x @ rotation(p, seed + 1)[:, :1]
    weights = torch.ones(total)
    weights[torch.randperm(total, generator=generator)[:num_dropped]] = 0
    leaf = (x + 0.3).requires_grad_()
    expected = 2.0 * (1 - REFERENCES[name](leaf[weights > 0], y[weights > 0]))
    if not expected.isfinite():
        return  # the unbiased estimate of a variance may be negative at so few rows
    expected.backward()
    case = {"x": {"x": leaf.detach()}, "y": {"y": y}, "pairs": [Pair("x", "y")], "weights": weights}
    loss, gradients = one_step(None, similarity=name, layout=layout, k=k, **case)
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-7, abs=1e-8)
    scale = max(float(leaf.grad.abs().max()), 1e-9)
    torch.testing.assert_close(gradients["x"] / scale, leaf.grad / scale, rtol=0, atol=1e-6)


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double(), nn.Sequential(
        nn.Linear(6, 12), nn.Tanh()
    ).double()


def guided_gradients(group: Any, *, x: Tensor, name: str, k: int) -> list[Tensor]:
    """The target's gradients by Guidance under DDP, in k micro-batches of each rank."""
    lines, (bare, guide) = Wires(group), networks()
    target = DistributedDataParallel(bare, process_group=group) if lines.size > 1 else bare
    guidance = Guidance(bare, guide, pairs=[Pair("0", "0")], similarity=name, num_micro_batches=k, group=group)
    parts = x.tensor_split(lines.size)[lines.rank].chunk(k)
    for collecting in [True, False] if k > 1 else [False]:
        for j, part in enumerate(parts):
            with torch.set_grad_enabled(not collecting), guidance.record():
                guidance.run_guide(part)
                output = target(part)
            if collecting:
                guidance.collect()
                continue
            sync = target.no_sync if lines.size > 1 and j < k - 1 else torch.enable_grad
            with sync():
                (guidance.loss() + 0 * output.sum()).backward()
        if collecting:
            guidance.reduce()
    assert all(torch.tensor(figures["debiased"]).isfinite() for figures in guidance.last["pairs"].values())
    return [parameter.grad for parameter in bare[0].parameters()]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("world_size", "k"), [(1, 1), (2, 2), (3, 1)])
def test_guidance_gives_the_gradient_of_the_reference(pool: Pool, name: str, world_size: int, k: int) -> None:
    x = torch.randn(24, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    target, guide = networks()
    (1 - REFERENCES[name](target[0](x), guide[0](x).detach())).backward()
    expected = [parameter.grad for parameter in target[0].parameters()]
    for gradients in pool.run(guided_gradients, world_size, x=x, name=name, k=k):
        for ours, theirs in zip(gradients, expected, strict=True):
            # The bias of a centred layer has no gradient: rounding alone.
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def matrices_of(x: Tensor, y: Tensor, centre: bool) -> tuple[Matrices, Pair]:
    pair = Pair("x", "y")
    widths = {pair.nodes[0]: x.shape[1], pair.nodes[1]: y.shape[1]}
    statistics = Statistics(make_plan([pair], widths, len(x), 1, {"gram"}), Wires(), centre=centre)
    statistics.add({"x": x}, {"y": y})
    return statistics.reduce(), pair


def test_debiased_value_and_floor_of_rows_that_are_not_centred() -> None:
    x, y = related_rows(24, 6, 9, mean=3.0)
    centred, raw = (matrices_of(x, y, centre) for centre in (True, False))
    ours, expected = companions(*raw, centred=False), companions(*centred)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    assert float(ours[0]) == pytest.approx(float(cka(x, y, "debiased")), rel=1e-9)
    zero = matrices_of(torch.zeros_like(x), y, centre=False)
    assert [float(value) for value in companions(*zero, centred=False)] == [0, 0, 0, 1]


GOOD = """
import torch
ROWS = "{rows}"
def gram(K, L):
    return (K * L).sum() / (K.square().sum() * L.square().sum()).sqrt()
"""
WITH_A_FEATURE_FORM = """
def feature(A, C, D):
    return C.square().sum() / (A.square().sum() * D.square().sum()).sqrt()
"""


@pytest.fixture
def own_file(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        (tmp_path / "mine.py").write_text(text)
        return "./mine.py"

    return write


@pytest.mark.parametrize("rows", ["none", "centre", "unit", "unit_centre"])
def test_a_similarity_of_ones_own(own_file: Callable[[str], str], rows: str) -> None:
    name = own_file(GOOD.format(rows=rows) + WITH_A_FEATURE_FORM)
    measure = Similarity(name)
    assert measure.forms == ({"gram", "feature"} if "centre" in rows else {"gram"})
    x, y = related_rows(12, 5, 4, mean=1.0)
    leaf = x.clone().requires_grad_()
    raw = [r / r.norm(dim=1, keepdim=True) if "unit" in rows else r for r in (leaf, y)]
    a, b = (r - r.mean(0) if "centre" in rows else r for r in raw)
    expected = (a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm())
    expected.backward()
    case = {"x": {"x": x}, "y": {"y": y}, "pairs": [Pair("x", "y")], "similarity": name, "layout": "auto"}
    loss, gradients = one_step(None, **case)
    assert float(loss) == pytest.approx(2 - 2 * float(expected.detach()), rel=1e-9)
    torch.testing.assert_close(gradients["x"], -2 * leaf.grad)


def test_guidance_by_a_similarity_that_does_not_centre_logs_the_figures_of_cka(
    own_file: Callable[[str], str],
) -> None:
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(5))
    figures = {}
    for name in ("cka", own_file(GOOD.format(rows="none"))):
        target, guide = (copy.deepcopy(network).float() for network in networks())
        guidance = Guidance(target, guide, pairs=[Pair("0", "0")], similarity=name)
        with guidance.record():
            guidance.run_guide(x)
            target(x)
        guidance.loss()
        figures[name] = guidance.last["pairs"]["0 <- 0"]
    ours, theirs = figures["./mine.py"], figures["cka"]
    assert ours["similarity"] != pytest.approx(theirs["similarity"], rel=1e-3)
    assert ours["debiased"] == pytest.approx(theirs["debiased"], rel=1e-5)
    assert ours["floor"] == pytest.approx(theirs["floor"], rel=1e-5)


MULTIPLIES = """
ROWS = "centre"
def gram(K, L):
    return (K @ L @ K).diagonal().sum() / ((K @ K).diagonal().sum() * L.diagonal().sum())
"""


@pytest.mark.parametrize("name", [*NAMES, "own"])
def test_autocast_does_not_reach_the_similarity(own_file: Callable[[str], str], name: str) -> None:
    x, y = (rows.float() for rows in related_rows(24, 5, 7))
    name = own_file(MULTIPLIES) if name == "own" else name
    case = {"x": {"x": x}, "y": {"y": y}, "pairs": [Pair("x", "y")], "similarity": name, "layout": "gather"}
    plain, plain_gradients = one_step(None, **case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradients = one_step(None, **case)
    assert torch.equal(loss, plain)
    assert torch.equal(gradients["x"], plain_gradients["x"])


BAD = {
    "no ROWS": ("def gram(K, L): return K.sum()", r"'\./mine.py' does not say how its rows .* none, centre, unit"),
    "ROWS": (GOOD.format(rows="center"), r"ROWS='center' is not known \(did you mean 'centre'\?\)"),
    "no gram": ("ROWS = 'none'", r"has no function gram\(K, L\)"),
    "gram": ("ROWS = 'none'\ngram = 3", r"has no function gram\(K, L\)"),
    "one argument": ("ROWS = 'none'\ndef gram(K): return K.sum()", r"gram\(K\) cannot be called with 2 arguments"),
    "three": ("ROWS = 'none'\ndef gram(K, L, M): return K", r"gram\(K, L, M\) cannot be called with 2 .*'M'"),
    "feature": (GOOD.format(rows="centre") + "def feature(C): return C.sum()", r"Define it as feature\(A, C, D\)"),
    "norms": (
        GOOD.format(rows="centre") + WITH_A_FEATURE_FORM + "NORMS = True",
        r"feature\(A, C, D\) cannot be called with 4 .* feature\(A, C, D, norms\)",
    ),
    "shape": ("ROWS = 'none'\ndef gram(K, L): return K @ L", r"gram must return a scalar .* gave shape \(8, 8\)"),
    "number": ("ROWS = 'none'\ndef gram(K, L): return 1.0", r"scalar tensor that carries gradient, .* gave float"),
    "detached": (
        "ROWS = 'none'\ndef gram(K, L): return (K * L).sum().detach()",
        r"carries gradient, but on random rows it gave shape \(\) without",
    ),
    "forms": (
        GOOD.format(rows="centre") + "def feature(A, C, D): return C.square().sum() / A.square().sum()",
        r"of the same 8 random rows gram makes 0\.\d+ and feature \d+\.\d+",
    ),
    "syntax": ("ROWS = 'none'\ndef gram(K, L)", r"mine\.py fails on import: SyntaxError: .*line 2"),
    "import": ("\nimport no_such_module", r"mine\.py, line 2 fails on import: ModuleNotFoundError: .*no_such_module"),
    "name": ("x = 1\n\nundefined", r"mine\.py, line 3 fails on import: NameError"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_file_is_said(own_file: Callable[[str], str], case: str) -> None:
    text, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        Similarity(own_file(text))


def test_a_file_that_is_not_there(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"there is no file .*mine\.py.* rsa_cosine"):
        Similarity(str(tmp_path / "mine.py"))
    with pytest.raises(ValueError, match="did you mean 'procrustes'"):
        Similarity("procustes")


def test_an_edited_file_counts(own_file: Callable[[str], str]) -> None:
    assert Similarity(own_file(GOOD.format(rows="none"))).rows == "none"
    assert Similarity(own_file(GOOD.format(rows="unit"))).rows == "unit"
