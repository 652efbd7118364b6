"""scale-guide consistency NETWORK...: do these networks answer the same validation samples wrongly?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from scale_guide.analysis.correctness import correctness
from scale_guide.analysis.error_consistency import (
    error_consistency,
    error_consistency_bounds,
    error_consistency_interval,
)
from scale_guide.analysis.heatmap import heatmap
from scale_guide.analysis.table import markdown
from scale_guide.commands import user_errors
from scale_guide.commands._comparing import read_request
from scale_guide.disk import write_atomically
from scale_guide.engine import Engine
from scale_guide.networks import open_network
from scale_guide.recipe import Option

OPTIONS = {
    "rows": Option(0, "Validation samples to read, random ones; 0: all."),
    "out": Option("consistency", "Folder for the picture and the JSON."),
}


def main(arguments: Sequence[str]) -> int:
    """Prints both tables, saves the matrix and its picture; returns 0. Collective: call on every rank."""
    with user_errors():
        request = read_request("consistency", arguments, OPTIONS)
        names = [source.label for source in request.sources]
        if len(set(names)) < max(2, len(names)):
            raise ValueError(f"consistency compares different networks, but was given {' '.join(names)}. Give two.")
        engine = Engine()
        with engine.building_whole():
            task, device = request.samples.task, engine.device
            networks = {source.label: open_network(source, task, device) for source in request.sources}
        answers = correctness(networks, request.samples, engine)
    if engine.is_main:
        _save(answers, Path(request.options["out"]))
    engine.close()
    return 0


def _save(answers: Mapping[str, Tensor], out: Path) -> None:
    """Writes picture and JSON, and prints the tables and where they are."""
    names = list(answers)
    accuracies = {name: float(vector.double().mean()) for name, vector in answers.items()}
    matrix = [[error_consistency(answers[a], answers[b]) for b in names] for a in names]
    pairs = [_pair(a, b, answers, accuracies) for a, b in combinations(names, 2)]
    num_rows = len(answers[names[0]])
    found = {"num_rows": num_rows, "accuracies": accuracies, "consistency": matrix, "pairs": pairs}
    write_atomically(out / "consistency.json", json.dumps(found, indent=1))
    figure = _draw(matrix, accuracies, num_rows)
    for kind in ("png", "svg"):
        figure.savefig(out / f"consistency.{kind}", dpi=130)
    print(markdown(["network", "accuracy"], [[name, f"{value:.4f}"] for name, value in accuracies.items()]) + "\n")
    head = ["network", "and network", "error consistency", "95 % interval", "bounds that the accuracies allow"]
    rows = [[p["a"], p["b"], f"{p['kappa']:.3f}", *(_span(p[k]) for k in ("interval", "bounds"))] for p in pairs]
    print(markdown(head, rows))
    print(f"\nCohen's kappa of right and wrong over {num_rows:,} samples: 1 the same mistakes, 0 as chance has it.")
    print(f"picture: {out / 'consistency.png'}, table: {out / 'consistency.json'}")


def _pair(a: str, b: str, answers: Mapping[str, Tensor], accuracies: Mapping[str, float]) -> dict[str, Any]:
    return {
        "a": a,
        "b": b,
        "kappa": error_consistency(answers[a], answers[b]),
        "interval": error_consistency_interval(answers[a], answers[b]),
        "bounds": error_consistency_bounds(accuracies[a], accuracies[b]),
    }


def _span(ends: Sequence[float]) -> str:
    return f"{ends[0]:.3f} to {ends[1]:.3f}"


def _draw(matrix: Sequence[Sequence[float]], accuracies: Mapping[str, float], num_rows: int) -> Figure:
    size = 3 + 0.7 * len(matrix)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axis = figure.subplots()
    labels = [f"{name}, {100 * value:.1f} %" for name, value in accuracies.items()]
    image = heatmap(axis, matrix, labels, list(accuracies), low=min(0.0, *map(min, matrix)))
    axis.set_title(f"error consistency and accuracies, {num_rows:,} samples", fontsize=10)
    figure.colorbar(image, label="Cohen's kappa of right and wrong", shrink=0.8)
    return figure
