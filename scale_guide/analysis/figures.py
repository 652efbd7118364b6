"""Pictures of the runs of one recipe: losses, scores, gradients, speed, similarity of layer pairs, CKA maps."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, MaxNLocator

from scale_guide.analysis.groups import Group
from scale_guide.analysis.heatmap import heatmap
from scale_guide.analysis.records import Line, Record

WIDTHS = {1: 6.0, 2: 9.5, 3: 12.0}
"""Inches of a figure, by the number of panels side by side."""
NUM_POINTS = 400
"""A longer curve is drawn as so many means of successive points."""
LARGEST = 3.4e38
"""Of fp32: what lies beyond is drawn no more than an infinite loss is."""
Points = Mapping[int, float]
Value = Callable[[Record, Line], float | None]


@dataclass(frozen=True)
class Picture:
    """A figure, the name of its files, and a sentence or two on what it shows."""

    name: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Panel:
    """What to draw of every run: a value of each line of its metrics, None of a line without it."""

    title: str
    value: Value
    scale: Literal["linear", "log", "auto"] = "auto"

    def points(self, record: Record) -> dict[int, float]:
        """Returns step -> value, where it can be drawn."""
        found = ((line.step, self.value(record, line)) for line in record.lines)
        lowest = 0 if self.scale == "log" else -LARGEST
        return dict(sorted((step, y) for step, y in found if y is not None and lowest < y < LARGEST))


def pictures(groups: Sequence[Group]) -> Iterator[Picture]:
    """Yields every picture of the groups of one recipe that there is something to draw of."""
    scores = dict.fromkeys(
        name for one in groups for record in one.records for name in record.scores if name != "loss"
    )
    seeds = " Thin: one seed; bold: the mean over seeds." if any(len(one.records) > 1 for one in groups) else ""
    for name, (caption, panels) in _panels(list(scores)).items():
        figure = _curves(groups, panels)
        if figure is not None:
            yield Picture(name, caption + seeds, figure)
    for one in groups:
        yield from _pairs(one)
        yield from _maps(one)


def file_name(text: str) -> str:
    """Returns a text without what does not belong in the name of a file."""
    return re.sub(r"[^\w.=-]+", "_", text)[:80]


def _panels(scores: Sequence[str]) -> dict[str, tuple[str, list[Panel]]]:
    """Returns name -> caption and panels of the figures that show all groups."""
    return {
        "losses": (
            "Training and validation loss over optimizer steps.",
            [Panel("training loss", _number("task_loss")), Panel("validation loss", _score("loss"))],
        ),
        "scores": (
            "Validation scores over optimizer steps.",
            [Panel(f"validation {name}", _score(name)) for name in scores],
        ),
        "gradients": (
            "Norm of the gradient at the guided layers: what guidance adds there, and what else arrives from above "
            "(of the task, and of the guidance of later layers).",
            [
                Panel("gradient of guidance", _number("gradient_norm_at_activations"), "log"),
                Panel("gradient from above", _number("upper_gradient_norm_at_activations"), "log"),
            ],
        ),
        "speed": (
            "Rows trained on per second, and the share of a step's time that guidance takes.",
            [
                Panel("rows per second", _number("rows_per_s"), "linear"),
                Panel("share of time spent on guidance", _share, "linear"),
            ],
        ),
    }


def _number(name: str) -> Value:
    return lambda record, line: line.numbers.get(name)


def _score(name: str) -> Value:
    return lambda record, line: line.validation.get(name)


def _pair_value(name: str, key: str) -> Value:
    return lambda record, line: line.pairs.get(name, {}).get(key)


def _share(record: Record, line: Line) -> float | None:
    seconds, rate = (line.numbers.get(name) for name in ("guidance_seconds", "rows_per_s"))
    return None if seconds is None or rate is None else seconds * rate / record.recipe.training.batch_size


def _curves(groups: Sequence[Group], panels: Sequence[Panel]) -> Figure | None:
    """Returns the panels beside each other: of each group a thin line a seed, and their mean; None without any."""
    shown = [panel for panel in panels if any(panel.points(r) for one in groups for r in one.records)]
    if not shown:
        return None
    columns = min(len(shown), len(WIDTHS))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(WIDTHS[columns], 3.2 * rows), layout="constrained")
    comparable = all(panel.scale == "log" for panel in shown)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=comparable).flatten()
    handles = []
    for number, one in enumerate(groups):  # a variant looks alike in every figure
        style: dict[str, Any] = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":", "-.")[number // 10 % 4]}
        drawn = [_draw_group(axis, one, panel, style) for axis, panel in zip(axes, shown, strict=False)]
        if any(drawn):
            handles.append(Line2D([], [], label=_label(one), **style))
    for axis, panel in zip(axes, shown, strict=False):
        _finish(axis, panel)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    _add_legend(figure, handles)
    return figure


def _draw_group(axis: Axes, one: Group, panel: Panel, style: Mapping[str, str]) -> bool:
    """Draws a thin line a seed and their mean; returns whether there was anything to draw."""
    seeds = [points for record in one.records if (points := panel.points(record))]
    for points in seeds if len(one.records) > 1 else ():
        _draw(axis, points, linewidth=0.7, alpha=0.5, **style)
    _draw(axis, _mean([panel.points(record) for record in one.counted]), linewidth=1.8, **style)
    return bool(seeds)


def _label(one: Group) -> str:
    """Returns what a legend says of a group; matplotlib takes $ for mathematics, and hides what starts with _."""
    text = textwrap.fill(one.label, 40, max_lines=3) + (f" ({one.unfinished})" if one.unfinished else "")
    return " " * text.startswith("_") + text.replace("$", r"\$")


def _add_legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Adds a legend below the panels, in as many columns as their width holds, and the height that it takes."""
    lines = [str(handle.get_label()).splitlines() for handle in handles]
    longest = max(len(line) for label in lines for line in label)
    columns = min(len(handles), max(1, int(figure.get_figwidth() * 11 / (longest + 6))))  # 11 letters an inch
    columns = math.ceil(len(handles) / math.ceil(len(handles) / columns))  # no fuller than need be
    height = 0.2 * max(map(len, lines)) * math.ceil(len(handles) / columns)
    figure.set_figheight(figure.get_figheight() + height)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def _mean(seeds: Sequence[Points]) -> Points:
    """Returns the mean over seeds at the steps that all have; of those that have any."""
    given = [points for points in seeds if points]
    common = sorted(set.intersection(*map(set, given))) if given else []
    return {step: float(np.mean([points[step] for points in given])) for step in common}


def _draw(axis: Axes, points: Points, **style: Any) -> None:
    if not points:
        return
    table = np.array([list(points), list(points.values())], dtype=np.float64)
    if table.shape[1] > NUM_POINTS:
        table = np.stack([piece.mean(axis=1) for piece in np.array_split(table, NUM_POINTS, axis=1)], axis=1)
    marker = "." if table.shape[1] <= 12 else ""
    axis.plot(*table, marker=marker, **style)


def _finish(axis: Axes, panel: Panel) -> None:
    """Sets title and scales: a logarithm where the largest value would leave no room for most of the others."""
    values = np.concatenate([line.get_ydata() for line in axis.lines])
    crowded = values.min() > 0 and values.max() > 30 * np.median(values)
    if panel.scale == "log" or (panel.scale == "auto" and crowded):
        axis.set_yscale("log")
    elif panel.scale == "linear":
        axis.set_ylim(bottom=min(0, values.min()))
    _over_steps(axis, panel.title)


def _over_steps(axis: Axes, title: str) -> None:
    axis.set(title=title, xlabel="step")
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def _pairs(one: Group) -> Iterator[Picture]:
    """Yields similarity, debiased value and floor of every layer pair over steps, the mean over seeds."""
    names = list(dict.fromkeys(name for record in one.counted for line in record.lines for name in line.pairs))
    if not names:
        return
    measure = Path(one.records[0].recipe.guidance.similarity).name
    titles = {"similarity": f"similarity ({measure})", "debiased": "debiased CKA", "floor": "floor: unrelated rows"}
    colours = colormaps["viridis"].resampled(len(names))
    figure = Figure(figsize=(WIDTHS[3], 3.4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for number, name in enumerate(names):
            panel = Panel(title, _pair_value(name, key))
            points = _mean([panel.points(record) for record in one.counted])
            _draw(axis, points, linewidth=1.1, color=colours(number))
        _over_steps(axis, title)
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(min(low, 0), max(high, 1))
    bar = ScalarMappable(Normalize(0.5, len(names) + 0.5), colours)
    ticks = MaxNLocator(nbins=8, integer=True)
    figure.colorbar(bar, ax=list(axes), label="layer pair, first to last", ticks=ticks, pad=0.01)
    ends = f" 1 is {names[0]}, {len(names)} is {names[-1]}." if len(names) > 1 else f" The pair is {names[0]}."
    caption = "similarity of the layer pairs over steps, its debiased value, and the floor that unrelated rows reach."
    yield Picture(f"pairs_{file_name(one.label)}", f"{one.label}: {caption}{ends}", figure)


def _maps(one: Group) -> Iterator[Picture]:
    """Yields the CKA of all target x guide layers before and after training, of the first seed that has it."""
    record = next((record for record in one.records if record.maps is not None), None)
    if record is None or record.maps is None:
        return
    maps = record.maps
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots(1, 2)
    pairs = {name.partition(" <- ")[::2] for line in record.lines for name in line.pairs}
    for axis, title, values in zip(axes, ("before", "after"), (maps.before, maps.after), strict=True):
        image = heatmap(axis, values, maps.target_layers, maps.guide_layers)
        axis.set(title=f"{title} training", xlabel="guide layer", ylabel="target layer")
        for target, guide in pairs:
            if target in maps.target_layers and guide in maps.guide_layers:
                corner = (maps.guide_layers.index(guide) - 0.5, maps.target_layers.index(target) - 0.5)
                axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="cyan", linewidth=1.5))
    figure.colorbar(image, ax=list(axes), label="debiased CKA", pad=0.01)
    caption = (
        f"{one.label}, seed {record.seed}: CKA of every target layer with every guide layer over "
        f"{maps.num_rows:,} examples, before and after training. Framed: the pairs that were guided."
    )
    yield Picture(f"maps_{file_name(one.label)}", caption, figure)
