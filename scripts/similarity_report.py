"""What bench_similarity.py makes of its figures: medians, ratios within a turn, the verdict of a point, the tables.

    python scripts/similarity_report.py grid_4.json grid_2.json grid_1.json     one table of several runs

A point that several files hold is taken from the last of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from similarity_methods import AUTO, Method, Size, methods

from scale_guide.statistics import LAYOUTS

VALUE_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3
ENOUGH_TURNS = 3


def judge(point: dict[str, Any]) -> None:
    """Adds medians, quartiles, ratios and `failures` (sentences; none: the point is as promised) to a point."""
    ways, figures = methods(), point["methods"]
    for figure in figures.values():
        times = figure["seconds"]
        figure["median_s"] = statistics.median(times)
        figure["quartiles_s"] = _quartiles(times)
    failures = []
    for name, figure in figures.items():
        way = ways[name]
        reference = figures[way.reference]
        pairs = zip(figure["seconds"], reference["seconds"], strict=True)
        figure["ratio"] = statistics.median(mine / ours for mine, ours in pairs)
        figure["faster"] = (
            len(figure["seconds"]) >= ENOUGH_TURNS and reference["quartiles_s"][0] > figure["quartiles_s"][1]
        )
        # The layout that auto took is the same code, and so are both Gram layouts of one process: the rest is noise.
        alike = {point["auto"]} if point["size"][3] > 1 or point["auto"] == "covariance" else {"gather", "transpose"}
        other_layout = way.layout and way.layout not in alike
        if figure["faster"] and (other_layout or way.package):
            failures.append(f"{name} is faster: {figure['ratio']:.2f} times the time of {way.reference}")
        failures += _disagreements(way, figure)
    point["failures"] = failures


def _quartiles(times: Sequence[float]) -> list[float]:
    if len(times) < 2:
        return [times[0], times[0]]
    lower, _, upper = statistics.quantiles(times, method="inclusive")
    return [lower, upper]


def _disagreements(way: Method, figure: dict[str, Any]) -> list[str]:
    # `not <=` sees NaN too.
    wrong = []
    if not figure["value_off"] <= VALUE_TOLERANCE:
        wrong.append(f"{way.name} gives another value: {figure['value_off']:.1e} off")
    if way.gradient != "value only" and not figure["gradient_off"] <= GRADIENT_TOLERANCE:
        wrong.append(f"{way.name} gives another gradient: {figure['gradient_off']:.1e} off")
    return wrong


def show(point: dict[str, Any]) -> None:
    """Prints one point: a line a method, what was left out and why, and what failed."""
    size, ways = Size(*point["size"]), methods()
    turns = max((len(figure["seconds"]) for figure in point["methods"].values()), default=0)
    print(f"\n{size}   auto takes {point['auto']}, {turns} turns" + _few(turns))
    if point["methods"]:
        print(f"{'method':42} {'seconds':>9} {'x auto':>7} {'peak MB':>9} {'wire MB':>8} {'gradient':>10} {'off':>8}")
    for name, figure in sorted(point["methods"].items(), key=lambda item: item[1]["median_s"]):
        label = name if ways[name].gradient == "exact" or ways[name].ours else f"{name}, {ways[name].gradient}"
        value_only = ways[name].gradient == "value only"
        gradient = f"{'-':>10} {'-':>8}" if value_only else f"{figure['gradient']:10.3e} {figure['gradient_off']:8.1e}"
        print(
            f"{label:42} {figure['median_s']:9.4f} {figure['ratio']:7.2f} {figure['memory'] / 1e6:9.1f} "
            f"{figure['bytes'] / 1e6:8.2f} {gradient}"
        )
    for name, reason in point["skipped"].items():
        print(f"{name:42} left out: {reason}")
    for failure in point["failures"]:
        print(f"FAILS: {failure}")


def show_table(points: Sequence[dict[str, Any]]) -> None:
    """Prints all points as one Markdown table: times of `auto`, and of the others as multiples of it."""
    print(f"\n| W | N | p, q | auto | seconds | {' | '.join(LAYOUTS)} | fastest peer | fastest baseline | |")
    print("|" + "---|" * (8 + len(LAYOUTS)))
    for point in points:
        n, p, q, w = point["size"]
        auto = point["methods"].get(AUTO)
        layouts = [_multiple(point, f"scale_guide {layout}") for layout in LAYOUTS]
        seconds = point["skipped"].get(AUTO, "-") if auto is None else _seconds(auto)
        others = [_fastest(point, peers=True), _fastest(point, peers=False)]
        verdict = "fails" if point["failures"] else "" if auto is None else "ok"
        cells = [w, f"{n:,}", f"{p:,}, {q:,}", point["auto"], seconds, *layouts, *others, verdict]
        print("| " + " | ".join(map(str, cells)) + " |")


def show_verdict(points: Sequence[dict[str, Any]]) -> int:
    """Prints which points fail, and returns the exit code."""
    timed = [point for point in points if AUTO in point["methods"]]
    failing = [point for point in points if point["failures"]]
    for point in timed:
        quick = [name for name, figure in point["methods"].items() if figure["faster"]]
        quick = [name for name in quick if not (methods()[name].layout or methods()[name].package)]
        for name in quick:
            ratio = point["methods"][name]["ratio"]
            print(f"{Size(*point['size'])}: the baseline {name} takes {ratio:.2f} times the time of auto")
    print(f"\n{len(timed)} of {len(points)} points timed, {len(failing)} fail")
    for point in failing:
        for failure in point["failures"]:
            print(f"{Size(*point['size'])}: {failure}")
    return 1 if failing else 0


def _few(turns: int) -> str:
    return "" if turns >= ENOUGH_TURNS else f" (fewer than {ENOUGH_TURNS})"


def _seconds(figure: dict[str, Any]) -> str:
    text = f"{figure['median_s']:.3g}"
    return text + _few(len(figure["seconds"]))


def _multiple(point: dict[str, Any], name: str) -> str:
    figure = point["methods"].get(name)
    return point["skipped"].get(name, "-") if figure is None else f"{figure['ratio']:.2f}"


def _fastest(point: dict[str, Any], *, peers: bool) -> str:
    """Returns the smallest ratio among peers, or among baselines, and whose it is."""
    ways = methods()
    ratios = {
        n: f["ratio"] for n, f in point["methods"].items() if not ways[n].ours and bool(ways[n].package) == peers
    }
    if not ratios:
        return "-"
    best = min(ratios, key=lambda name: ratios[name])
    return f"{ratios[best]:.2f} {best}"


def main() -> int:
    """Prints the table and the verdict of saved figures; returns 1 if a point fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="what bench_similarity.py --json wrote")
    runs = [json.loads(path.read_text()) for path in parser.parse_args().files]
    print("\n".join(dict.fromkeys(run["machine"] for run in runs)))
    points = {tuple(point["size"]): point for run in runs for point in run["points"]}
    show_table(list(points.values()))
    return show_verdict(list(points.values()))


if __name__ == "__main__":
    raise SystemExit(main())
