"""The choice of layout, from shapes alone."""

from __future__ import annotations

import pytest

from scale_guide.statistics import Pair, make_plan

BOTH = {"gram", "feature"}


def chosen(n: int, p: int, q: int, w: int, forms: set[str] = BOTH) -> str:
    pair = Pair("x", "y")
    return make_plan([pair], {pair.nodes[0]: p, pair.nodes[1]: q}, n, w, forms).parts[0].layout


@pytest.mark.parametrize(
    ("n", "p", "q", "w", "layout"),
    [
        (256, 65_536, 65_536, 4, "transpose"),
        (4_096, 512, 768, 4, "covariance"),
        (256, 65_536, 65_536, 1, "gather"),
        (4_096, 64, 64, 1, "covariance"),
        (64, 1_000, 100_000, 8, "transpose"),
    ],
)
def test_auto(n: int, p: int, q: int, w: int, layout: str) -> None:
    assert chosen(n, p, q, w) == layout


def test_auto_never_takes_a_form_the_similarity_lacks() -> None:
    assert chosen(4_096, 64, 64, 4, {"gram"}) != "covariance"
    with pytest.raises(ValueError, match="feature form"):
        make_plan([Pair("x", "y")], {("target", "x"): 4, ("guide", "y"): 4}, 8, 1, {"gram"}, "covariance")


def test_costs_are_those_of_the_table() -> None:
    pair, n, p, q, w = Pair("x", "y"), 64, 10, 6, 4
    b, share = n // w, 9 / 16
    costs = make_plan([pair], {pair.nodes[0]: p, pair.nodes[1]: q}, n, w, BOTH).parts[0].costs
    assert costs["gather"].wire == n * (p + q)
    assert costs["gather"].flops == 2 * n**2 * share * (p + q) + 2 * b * n * p
    assert costs["transpose"].wire == b * (2 * p + q) + 2 * n**2
    assert costs["transpose"].flops == 2 * b * n * (share * (p + q) + p)
    assert costs["covariance"].wire == 2 * p * q + p**2 + q**2
    assert costs["covariance"].flops == 2 * b * (2 * p * q + (1 + share) * p**2 + share * q**2)
    assert [costs[layout].messages for layout in ("gather", "transpose", "covariance")] == [1, 3, 2]
    assert costs["transpose"].state == 2 * n**2 + b * (p + q)
    alone = make_plan([pair], {pair.nodes[0]: p, pair.nodes[1]: q}, n, 1, BOTH).parts[0].costs
    assert all(cost.wire == cost.messages == 0 for cost in alone.values())
    assert costs["covariance"].state == p * q + p**2 + q**2


def test_a_shared_layer_is_paid_once_and_parts_are_connected() -> None:
    pairs = [Pair("a", "g"), Pair("b", "g"), Pair("c", "h"), Pair("b", "i")]
    widths = {("target", t): 8 for t in "abc"} | {("guide", g): 8 for g in "ghi"}
    plan = make_plan(pairs, widths, 32, 2, BOTH, "gather")
    assert sorted(len(part.pairs) for part in plan.parts) == [1, 3]
    large = max(plan.parts, key=lambda part: len(part.pairs))
    assert large.costs["gather"].wire == 32 * 4 * 8
    assert "gather for 4 pairs" in str(plan)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"guidance\.pairs is empty"):
        make_plan([], {}, 8, 1, BOTH)
    with pytest.raises(ValueError, match="more than once"):
        make_plan([Pair("a", "b"), Pair("a", "b", 2.0)], {("target", "a"): 1, ("guide", "b"): 1}, 8, 1, BOTH)
