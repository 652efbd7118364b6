"""scale-guide plan: what the guidance of a recipe costs per step and rank on N processes; no weights are allocated."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scale_guide.analysis.table import markdown
from scale_guide.build import build_task, plan_guidance, trace_recipe
from scale_guide.commands import user_errors
from scale_guide.config import Recipe
from scale_guide.data_order import batch_sizes
from scale_guide.recipe import Option, read_recipe, variants
from scale_guide.statistics import Pair, Plan

BYTES = 4
NUM_PROCESSES = Option(1, "Number of processes to plan for.")


def main(arguments: Sequence[str]) -> int:
    """Prints the plan; returns 0."""
    with user_errors():
        recipe, chosen = read_recipe("plan", arguments, {"num_processes": NUM_PROCESSES})
        guided = [r for r in variants(recipe).values() if r.guidance.weight]
        if not guided:
            raise ValueError("guidance.weight=0: nothing to plan without a guide. Set guidance.weight above 0.")
        print(describe(guided[0], chosen["num_processes"]))
    return 0


def describe(recipe: Recipe, num_processes: int) -> str:
    """Returns the plan as text.

    Raises:
        ValueError: sizes or layers that do not fit.
    """
    if num_processes < 1:
        raise ValueError(f"--num_processes={num_processes} must be at least 1.")
    micro_batch_size, k = batch_sizes(recipe.training.batch_size, recipe.training.micro_batch_size, num_processes)
    task = build_task(recipe)
    layers = trace_recipe(recipe, task)
    plan = plan_guidance(recipe, layers, task, num_processes=num_processes, num_micro_batches=k)
    costs = [(part, part.costs[part.layout]) for part in plan.parts]
    rows = [
        [
            *(part.layout, str(len(part.pairs))),
            *(f"{cost.wire * BYTES:.3g}", f"{cost.flops:.3g}", f"{cost.state * BYTES:.3g}"),
            ", ".join(f"{name} {other.score:.2g}" for name, other in part.costs.items()),
        ]
        for part, cost in costs
    ]
    wire, flops, state = (sum(getattr(cost, what) for _, cost in costs) for what in ("wire", "flops", "state"))
    rows.append(["all", str(len(layers.pairs)), f"{wire * BYTES:.3g}", f"{flops:.3g}", f"{state * BYTES:.3g}", ""])
    head = ["layout", "pairs", "bytes on the wire", "flops", "bytes of memory", "score of each layout (flops)"]
    pairs = [[p.target, p.guide, *_widths(plan, p), f"{_floor(plan, p):.3f}"] for p in layers.pairs]
    passes = "" if k == 1 else f" x {k} micro-batches"
    return "\n\n".join(
        [
            f"{recipe.target.name} guided by {recipe.guide.name}: {recipe.training.batch_size} rows = "
            f"{num_processes} processes{passes} x {micro_batch_size}\n{plan}",
            "Per step and rank, in fp32:",
            markdown(head, rows),
            markdown(["target", "guide", "p", "q", "null floor, at most"], pairs),
            "The null floor is the similarity of unrelated rows. Real activations lie far below this bound; training "
            "logs the value of every pair.",
        ]
    )


def _widths(plan: Plan, pair: Pair) -> list[str]:
    return [str(plan.widths[node]) for node in pair.nodes]


def _floor(plan: Plan, pair: Pair) -> float:
    """Returns sqrt(d_x d_y) / (N - 1) at the largest effective dimensions d that the widths allow."""
    free = plan.num_rows - 1
    return math.sqrt(math.prod(min(plan.widths[node], free) for node in pair.nodes)) / free
