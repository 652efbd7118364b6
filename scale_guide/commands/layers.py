"""scale-guide layers: the layers of both networks in execution order, their shapes, and the pairs."""

from __future__ import annotations

from collections.abc import Sequence

from scale_guide.analysis.report import markdown
from scale_guide.build import build_task, trace_recipe
from scale_guide.commands import user_errors
from scale_guide.layer_map import Layer
from scale_guide.recipe import read_recipe, variants


def main(arguments: Sequence[str]) -> int:
    """Prints the tables; returns 0."""
    with user_errors():
        recipe, _ = read_recipe("layers", arguments)
        guided = [r for r in variants(recipe).values() if r.guidance.weight] or [recipe]
        layers = trace_recipe(guided[0], build_task(guided[0]))
    print(f"target {guided[0].target.name}\n\n{_table(layers.target)}\n")
    if layers.guide:
        print(f"guide {guided[0].guide.name}\n\n{_table(layers.guide)}\n")
        rows = [[pair.target, pair.guide, f"{pair.weight:g}"] for pair in layers.pairs]
        print(f"pairs ({guided[0].guidance.pairs})\n\n{markdown(['target', 'guide', 'weight'], rows)}")
    return 0


def _table(layers: Sequence[Layer]) -> str:
    rows = [[str(i), la.name, "x".join(map(str, la.shape)), str(la.width)] for i, la in enumerate(layers)]
    return markdown(["", "layer", "output of one example", "columns"], rows)
