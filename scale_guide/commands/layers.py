"""scale-guide layers: the layers of both networks in execution order, their shapes, and the pairs.

With --measure also what one batch says of each pair: its CKA, and how many rows it takes to trust it.
"""

from __future__ import annotations

from collections.abc import Sequence

from scale_guide.analysis.measure import measure, summary
from scale_guide.analysis.table import markdown
from scale_guide.build import build_task, outline, trace_recipe
from scale_guide.commands import user_errors
from scale_guide.config import Recipe
from scale_guide.layer_map import Layer
from scale_guide.recipe import Option, read_recipe, variants
from scale_guide.tasks import Task

MEASURE = Option(
    False,
    "Also run the first batch of training (training.batch_size examples, training.micro_batch_size or 64 at a time) "
    "through both networks, as a run starts with them, in this one process. Prints for each pair its CKA, biased and "
    "debiased, what unrelated rows would give (the floor), the effective dimensions of both layers, and the rows it "
    "needs for a floor below 0.1.",
)


def main(arguments: Sequence[str]) -> int:
    """Prints the tables, and with --measure a sentence per pair; returns 0."""
    with user_errors():
        recipe, chosen = read_recipe("layers", arguments, {"measure": MEASURE})
        guided = next((r for r in variants(recipe).values() if r.guidance.weight), recipe)
        task = build_task(guided)
        layers = trace_recipe(guided, task)
        if chosen["measure"] and not layers.pairs:
            raise ValueError("guidance.weight=0: --measure has no pairs to measure. Set guidance.weight above 0.")
    print(f"target {guided.target.name}, {_size('target', guided, task)}\n\n{_table(layers.target)}\n")
    if layers.guide:
        print(f"guide {guided.guide.name}, {_size('guide', guided, task)}\n\n{_table(layers.guide)}\n")
        rows = [[str(i), pair.target, pair.guide, f"{pair.weight:g}"] for i, pair in enumerate(layers.pairs)]
        print(f"pairs ({guided.guidance.pairs})\n\n{markdown(['', 'target', 'guide', 'weight'], rows)}", flush=True)
    if chosen["measure"]:
        with user_errors():
            figures = measure(guided, task, layers)
        print("\n" + "\n".join(map(str, figures)) + f"\n\n{summary(figures)}")
    return 0


def _size(kind: str, recipe: Recipe, task: Task) -> str:
    network = outline(kind, recipe, task)
    return f"{sum(p.numel() for p in network.parameters()):,} parameters"


def _table(layers: Sequence[Layer]) -> str:
    rows = [[str(i), la.name, "x".join(map(str, la.shape)), str(la.width)] for i, la in enumerate(layers)]
    return markdown(["", "layer", "output of one example", "columns"], rows)
