"""Runs -> tables for the terminal and a README, pictures, and one page to send to a colleague."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from matplotlib.figure import Figure
from matplotlib.text import Text
from tqdm import tqdm

from scale_guide.analysis import page
from scale_guide.analysis.figures import Picture, file_name, pictures
from scale_guide.analysis.groups import Group, group
from scale_guide.analysis.records import Record, read_runs
from scale_guide.analysis.table import Table, compare
from scale_guide.disk import write_atomically
from scale_guide.tracking import plain

DPI = 150
TEXT_PX = 12.2
"""Least height of a figure's text on the page, in CSS pixels."""


@dataclass(frozen=True)
class Report:
    """Groups of runs by the name of their recipe, and what is wrong with them, a sentence each."""

    recipes: Mapping[str, Sequence[Group]]
    problems: Sequence[str]

    def __str__(self) -> str:
        """What the terminal shows: the tables, with headings if there are several, and the problems."""
        several = len(self.recipes) > 1
        tables = [f"## {name}\n\n" * several + str(compare(groups)) for name, groups in self.recipes.items()]
        return "\n\n".join(tables + _bullets(self.problems))

    @property
    def records(self) -> list[Record]:
        """All runs that could be read."""
        return [record for groups in self.recipes.values() for one in groups for record in one.records]


def read(paths: Sequence[Path]) -> Report:
    """Returns the runs in and below some folders.

    Raises:
        ValueError: a folder without any run.
    """
    records, problems = read_runs(paths)
    groups, more = group(records)
    names = dict.fromkeys(one.recipe for one in groups)
    return Report({name: [one for one in groups if one.recipe == name] for name in names}, problems + more)


def write(paths: Sequence[Path], out: Path) -> str:
    """Writes report.md, report.html and figures/ (PNG and SVG); returns the tables, the problems and the place.

    Args:
        paths: Run folders, or folders that hold some.
        out: Where to write.

    Raises:
        ValueError: a folder without any run, or `out` cannot be made.
    """
    found = read(paths)
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out={str(out)!r} cannot be made ({error.strerror}). Choose another place.") from error
    several, runs = len(found.recipes) > 1, _runs(found.records)
    text, html = [], [page.note(_summary(found.records)), page.problems(found.problems)]
    for name, groups in found.recipes.items():
        table = compare(groups)
        text += [f"## {name}"] * several + [str(table), *table.notes]
        html += [page.heading(name)] * several + [page.table(table.head, table.rows), *map(page.note, table.notes)]
        prefix = f"{file_name(name)}_" if several else ""
        for picture in tqdm(pictures(groups), desc=f"drawing {name}", leave=False, disable=None):
            png = _save(picture, out / "figures" / f"{prefix}{picture.name}")
            text += [f"![{picture.name}](figures/{prefix}{picture.name}.png)", picture.caption]
            html.append(page.image(png, picture.caption, name=picture.name, width=_least_width(picture.figure)))
    html += [page.heading("Runs"), page.table(runs.head, runs.rows), *map(_details, found.records)]
    write_atomically(out / "report.md", "\n\n".join([*text, *_bullets(found.problems), str(runs)]) + "\n")
    write_atomically(out / "report.html", page.whole(_title(found), html))
    return f"{found}\n\nreport: {out / 'report.html'}"


def _title(found: Report) -> str:
    return "Runs of " + (", ".join(name for name in found.recipes if name) or "scale_guide")


def _bullets(problems: Sequence[str]) -> list[str]:
    return ["\n".join(f"- {problem}" for problem in problems)] if problems else []


def _summary(records: Sequence[Record]) -> str:
    finished = sum(record.state == "finished" for record in records)
    return f"{len(records)} runs, {finished} of them finished; {time.strftime('%Y-%m-%d %H:%M %Z')}."


def _save(picture: Picture, path: Path) -> bytes:
    """Writes a picture as PNG and SVG; returns the PNG."""
    for kind in ("svg", "png"):
        buffer = io.BytesIO()
        picture.figure.savefig(buffer, format=kind, dpi=DPI)
        write_atomically(path.with_name(f"{path.name}.{kind}"), buffer.getvalue())
    return buffer.getvalue()


def _least_width(figure: Figure) -> int:
    """Returns the width in CSS pixels at which no text of a figure is less than TEXT_PX high."""
    smallest = min(float(text.get_fontsize()) for text in figure.findobj(Text) if text.get_text())
    return math.ceil(figure.get_figwidth() * 72 / smallest * TEXT_PX)


def _runs(records: Sequence[Record]) -> Table:
    """Returns a row a run."""
    head = ["run folder", "seed", "steps", "score", "started", "device", "commit"]
    rows = []
    for record in records:
        name, facts = record.headline, record.environment
        score = f"{name} {record.scores[name]:.4g}" if name is not None and name in record.scores else "-"
        commit = str(facts.get("commit") or "-")[:10]
        told = [str(facts.get(key, "-")) for key in ("started", "device")]
        rows.append([str(record.path), str(record.seed), record.progress, score, *told, commit])
    return Table(head, rows)


def _details(record: Record) -> str:
    environment = json.dumps(record.environment, indent=1)
    return page.details(str(record.path), f"{yaml.safe_dump(plain(record.recipe), sort_keys=False)}\n{environment}")
