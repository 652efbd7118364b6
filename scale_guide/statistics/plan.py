"""Which layout computes which layer pairs: a cost model over shapes and the number of processes, nothing else.

With b = N / W rows per rank, widths p (target layer) and q (guide layer), per rank (DESIGN 3), s = 9/16 the share of a
symmetric product that is multiplied:

    layout      elements on the wire   messages  flops                                  elements of matrices
    gather      N(p + q)               1         s 2N^2(p + q) + 2bNp                   2N^2
    transpose   b(2p + q) + 2N^2       3         2bN(s(p + q) + p)                      2N^2
    covariance  2pq + p^2 + q^2        2         2b(2pq + (1 + s)p^2 + s q^2)           pq + p^2 + q^2

and what is kept is the matrices, and of the Gram layouts N(p + q) or b(p + q) elements of rows. A layer's share is
paid once, however many pairs it is in; so is a message, which carries all layers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Side = Literal["target", "guide"]
Node = tuple[Side, str]
Layout = Literal["gather", "transpose", "covariance"]
LAYOUTS: tuple[Layout, ...] = ("gather", "transpose", "covariance")

# Covariance: the second one is of row norms, for unbiased estimates, which training logs.
_MESSAGES: dict[Layout, int] = {"gather": 1, "transpose": 3, "covariance": 2}
FLOPS_PER_ELEMENT = 1000
"""Multiply-adds worth one fp32 element on the wire: about 400 over gloo on two cores, 1,000 to 8,000 on GPUs."""
FLOPS_PER_MESSAGE = 2 * 10**8
"""Multiply-adds worth the latency of one collective: milliseconds over gloo on busy cores, tens of us on GPUs."""
FLOPS_PER_MATRIX_ELEMENT = 600
"""Multiply-adds worth what is done to an element of the matrices besides products: centring, squares, gradients."""
SYMMETRIC = 9 / 16
"""Share of a symmetric product that is multiplied (`matrices.add_symmetric`)."""


@dataclass(frozen=True)
class Pair:
    """One edge of the graph: a target layer pulled towards a guide layer with `weight`."""

    target: str
    guide: str
    weight: float = 1.0

    @property
    def nodes(self) -> tuple[Node, Node]:
        """The two layers it joins, with the network each belongs to."""
        return ("target", self.target), ("guide", self.guide)

    def __str__(self) -> str:
        return f"{self.target} <- {self.guide}"


@dataclass(frozen=True)
class Cost:
    """What one layout costs a rank per step.

    Attributes:
        wire: Elements handed to collectives.
        messages: Collectives.
        flops: Of the matrix products.
        matrices: Elements of the matrices.
        state: Elements kept: the matrices and rows.
    """

    wire: float
    messages: int
    flops: float
    matrices: float
    state: float

    @property
    def score(self) -> float:
        """One number to compare layouts by, in flops."""
        moved = FLOPS_PER_ELEMENT * self.wire + FLOPS_PER_MESSAGE * self.messages
        return self.flops + FLOPS_PER_MATRIX_ELEMENT * self.matrices + moved


@dataclass(frozen=True)
class Part:
    """A connected part of the graph, its layout, and what each possible layout would cost."""

    pairs: tuple[Pair, ...]
    layout: Layout
    costs: Mapping[Layout, Cost]


@dataclass(frozen=True)
class Plan:
    """How the statistics of one step are computed: the parts, the widths of the layers, and the sizes planned for."""

    parts: tuple[Part, ...]
    widths: Mapping[Node, int]
    num_rows: int
    num_processes: int

    def pairs(self, layout: Layout) -> list[Pair]:
        """Returns the pairs that `layout` computes, in the order of the map."""
        return [pair for part in self.parts if part.layout == layout for pair in part.pairs]

    def __str__(self) -> str:
        chosen = {layout: len(self.pairs(layout)) for layout in LAYOUTS if self.pairs(layout)}
        counts = ", ".join(f"{layout} for {count} pair{'s' * (count > 1)}" for layout, count in chosen.items())
        return f"{counts} ({self.num_rows} rows over {self.num_processes} process{'es' * (self.num_processes > 1)})"


def make_plan(
    pairs: Sequence[Pair],
    widths: Mapping[Node, int],
    num_rows: int,
    num_processes: int,
    forms: Collection[str],
    layout: Layout | Literal["auto"] = "auto",
) -> Plan:
    """Returns the plan of one step: every connected part of the graph with the layout that computes it.

    Args:
        pairs: Edges of the graph.
        widths: Number of columns p or q of each layer's rows.
        num_rows: N, rows of the global batch.
        num_processes: W.
        forms: What the similarity has: {"gram"} or {"gram", "feature"}.
        layout: auto takes the cheapest by `Cost.score`; a name forces that layout.

    Raises:
        ValueError: no pairs, a pair named twice, an unknown layout, or covariance for a similarity without a feature
            form.
    """
    if not pairs:
        raise ValueError(
            "guidance.pairs is empty: at least one target layer must be paired with a guide layer. Run "
            "`scale-guide layers --config ...` to see both lists, or set guidance.weight to 0 to train alone."
        )
    twice = [str(pair) for pair in pairs if sum(p.nodes == pair.nodes for p in pairs) > 1]
    if twice:
        raise ValueError(f"guidance.pairs names {twice[0]!r} more than once. Give it once, with the weights added.")
    if layout not in ("auto", *LAYOUTS):
        raise ValueError(f"guidance.layout={layout!r} is not known. Known: auto, {', '.join(LAYOUTS)}.")
    if layout == "covariance" and "feature" not in forms:
        raise ValueError(
            "guidance.layout='covariance' needs a similarity with a feature form, which this one lacks. "
            "Use layout auto, gather or transpose."
        )
    allowed = [name for name in LAYOUTS if name != "covariance" or "feature" in forms]
    parts = []
    for connected in _connected(pairs):
        costs = {name: _cost(name, connected, widths, num_rows, num_processes) for name in allowed}
        chosen = min(allowed, key=lambda name: costs[name].score) if layout == "auto" else layout
        parts.append(Part(pairs=tuple(connected), layout=chosen, costs=costs))
    return Plan(tuple(parts), dict(widths), num_rows, num_processes)


def check_memory(plan: Plan, num_bytes: int) -> None:
    """Checks that the Gram matrices of each part, fp32, fit into `num_bytes` of memory.

    Raises:
        ValueError: they do not; names the pair, the size and the ways out.
    """
    for part in plan.parts:
        nodes = {node for pair in part.pairs for node in pair.nodes}
        size = 4 * len(nodes) * plan.num_rows**2
        if part.layout != "covariance" and size > num_bytes:
            raise ValueError(
                f"guidance: the pair {part.pairs[0]} and what shares a layer with it need {len(nodes)} matrices of "
                f"{plan.num_rows:,} x {plan.num_rows:,} rows: {size / 1e9:,.0f} GB of {num_bytes / 1e9:,.0f} here. "
                "Use guidance.rows mean or last, a smaller training.batch_size, or a similarity with a feature form "
                "(cka) and layout auto."
            )


def _connected(pairs: Sequence[Pair]) -> list[list[Pair]]:
    groups: list[tuple[set[Node], list[Pair]]] = []
    for pair in pairs:
        nodes, members = set(pair.nodes), [pair]
        for group in [g for g in groups if g[0] & nodes]:
            groups.remove(group)
            nodes |= group[0]
            members = group[1] + members
        groups.append((nodes, members))
    return [members for _, members in groups]


def _cost(
    layout: Layout, pairs: Sequence[Pair], widths: Mapping[Node, int], num_rows: int, num_processes: int
) -> Cost:
    nodes = {node for pair in pairs for node in pair.nodes}
    targets = [widths[node] for node in nodes if node[0] == "target"]
    guides = [widths[node] for node in nodes if node[0] == "guide"]
    p, q, n = sum(targets), sum(guides), num_rows
    b = math.ceil(n / num_processes)
    wire: float
    if layout == "covariance":
        p2, q2 = sum(w**2 for w in targets), sum(w**2 for w in guides)
        pq = sum(widths[pair.nodes[0]] * widths[pair.nodes[1]] for pair in pairs)
        matrices, rows, wire = pq + p2 + q2, 0, 2 * pq + p2 + q2
        flops = 2 * b * (2 * pq + (1 + SYMMETRIC) * p2 + SYMMETRIC * q2)
    elif layout == "transpose":
        matrices, rows = len(nodes) * n**2, b * (p + q)
        wire, flops = b * (2 * p + q) + matrices, 2 * b * n * (SYMMETRIC * (p + q) + p)
    else:
        matrices, rows, wire = len(nodes) * n**2, n * (p + q), n * (p + q)
        flops = 2 * n**2 * SYMMETRIC * (p + q) + 2 * b * n * p
    if num_processes == 1:
        return Cost(wire=0, messages=0, flops=flops, matrices=matrices, state=matrices + rows)
    return Cost(wire=wire, messages=_MESSAGES[layout], flops=flops, matrices=matrices, state=matrices + rows)
