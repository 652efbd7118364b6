"""scale-guide similarity A [B]: CKA between all layers of two networks, or of a run's target and its guide."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scale_guide.analysis.cka_map import Comparison, compare
from scale_guide.analysis.map_figure import draw
from scale_guide.analysis.table import markdown
from scale_guide.commands import user_errors
from scale_guide.commands._comparing import Request, read_request
from scale_guide.disk import write_atomically
from scale_guide.engine import Engine
from scale_guide.layer_map import LISTS
from scale_guide.networks import Network, open_guide, open_network
from scale_guide.recipe import Option

OPTIONS = {
    "rows": Option(1024, "Validation samples to read, random ones; 0, or more than there are: all."),
    "layers": Option(
        "",
        f"{', '.join(LISTS)}, or names and globs with commas between, of both networks. Empty: weights; of a run, "
        "what its recipe says.",
    ),
    "out": Option("", "Folder for the picture and the JSON; empty: the run's if it stands alone, else similarity."),
}
Maps = Mapping[str, tuple[str, str]]
"""Title -> names of the two networks of a map."""


def main(arguments: Sequence[str]) -> int:
    """Prints the table, saves map and figures; returns 0. Collective: call on every rank."""
    with user_errors():
        request = read_request("similarity", arguments, OPTIONS)
        if len(request.sources) > 2:
            raise ValueError(f"similarity compares one or two networks, not {len(request.sources)}. Give A or A B.")
        engine = Engine()
        with engine.building_whole():
            networks, maps = _open(request, engine)
        comparison = compare(networks, request.samples, engine)
    if engine.is_main:
        _save(comparison, maps, request)
    engine.close()
    return 0


def _open(request: Request, engine: Engine) -> tuple[dict[str, Network], Maps]:
    """Returns the networks by name, and which of them to compare: a run alone stands for its target and guide."""
    task, device = request.samples.task, engine.device
    first, last = request.sources[0], request.sources[-1]
    if request.run is not None:
        networks = {
            "target before": open_network(first, task, device, trained=False),
            "target after": open_network(first, task, device),
            "guide": open_guide(first, task, device),
        }
        maps = {"before": ("target before", "guide"), "after": ("target after", "guide")}
    else:
        networks = {source.label: open_network(source, task, device) for source in request.sources}
        maps = {"": (first.label, last.label)}
    layers = request.options["layers"]
    if layers:
        chosen = layers if layers in LISTS else layers.split(",")
        networks = {name: replace(network, layers=chosen) for name, network in networks.items()}
    return networks, maps


def _save(comparison: Comparison, maps: Maps, request: Request) -> None:
    """Writes picture and JSON, and prints the table and where they are."""
    run = request.run
    out = Path(request.options["out"] or run or "similarity")
    out.mkdir(parents=True, exist_ok=True)
    figure = draw(comparison, maps)
    for kind in ("png", "svg"):
        figure.savefig(out / f"similarity.{kind}", dpi=130)
    tables = {title: comparison.between(*pair) for title, pair in maps.items()}
    found: dict[str, Any] = {
        "num_rows": comparison.num_rows,
        "intrinsic_dimension": {
            name: [None if math.isnan(value) else value for value in values]
            for name, values in comparison.dimensions.items()
        },
        "num_points": comparison.num_points,
    }
    if run is not None:
        layers = {"target_layers": comparison.layers["target after"], "guide_layers": comparison.layers["guide"]}
        found = {**layers, **tables, **found}
    else:
        found = {"layers": comparison.layers, "cka": tables[""], **found}
    place = run / "maps.json" if run is not None else out / "similarity.json"
    write_atomically(place, json.dumps(found, indent=1))
    print(f"{_table(comparison, maps)}\n\nDebiased CKA over {comparison.num_rows:,} samples; ", end="")
    print(f"dimensions by TwoNN over {comparison.num_points:,}.\npicture: {out / 'similarity.png'}, table: {place}")


def _table(comparison: Comparison, maps: Maps) -> str:
    """Returns for each layer of a map's first network its dimension, and the most similar layer of the second."""
    head, columns = ["layer"], [next(iter(comparison.layers.values()))]
    for title, (first, second) in maps.items():
        when = f", {title}" if title else ""
        head += [f"dimension{when}", f"nearest in {second} (its dimension){when}", "CKA"]
        columns += map(list, zip(*_lines(comparison, first, second), strict=True))
    return markdown(head, list(zip(*columns, strict=True)))


def _lines(comparison: Comparison, first: str, second: str) -> Iterator[tuple[str, str, str]]:
    """Yields a layer's dimension, the other network's nearest layer, and CKA; a layer is not its own neighbour."""
    ours = [f"{value:.1f}" if value == value else "no spread" for value in comparison.dimensions[first]]
    theirs = [f"{x} ({d:.1f})" for x, d in zip(comparison.layers[second], comparison.dimensions[second], strict=True)]
    for i, row in enumerate(comparison.between(first, second)):
        others = [j for j in range(len(row)) if first != second or j != i]
        nearest = max(others, key=row.__getitem__) if others and any(row) else None
        yield ours[i], *(("-", "-") if nearest is None else (theirs[nearest], f"{row[nearest]:.3f}"))
