"""The table of a report: a row a variant, over its seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from scale_guide.analysis.groups import Group, unguided
from scale_guide.analysis.seeds import estimate, paired_difference


class Table(NamedTuple):
    """Text cells under a head, and what the reader must know of them, a sentence each."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        return markdown(self.head, self.rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table with aligned columns."""
    cells = [[" ".join(cell.split()).replace("|", r"\|") for cell in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def compare(groups: Sequence[Group]) -> Table:
    """Returns the table of the groups of one recipe.

    Numbers are means over the seeds, with standard errors; columns that would be empty are left out.
    """
    names = dict.fromkeys(name for one in groups for record in one.counted for name in record.scores)
    several = any(len(one.records) > 1 for one in groups)
    columns = {"run": [one.label for one in groups]}
    if several:
        columns["seeds"] = [_seeds(one) for one in groups]
    columns["steps"] = [_steps(one) for one in groups]
    columns |= {f"validation {name}": [_mean(list(one.scores(name).values())) for one in groups] for name in names}
    notes = ["+- is the standard error over seeds."] if several else []
    for title, cells, note in (_differences(groups), _published(groups)):
        if any(cells):
            columns[title] = cells
            notes.append(note)
    columns["training loss"] = [_last(one, "task_loss") for one in groups]
    columns["similarity"] = [_last(one, "similarity") for one in groups]
    columns["seconds"] = [f"{sum(r.seconds for r in one.counted) / len(one.counted):.0f}" for one in groups]
    columns = {title: [cell or "-" for cell in cells] for title, cells in columns.items() if any(cells)}
    return Table(list(columns), list(zip(*columns.values(), strict=True)), notes)


def _seeds(one: Group) -> str:
    finished = sum(record.state == "finished" for record in one.records)
    return f"{finished} ({one.unfinished})" if one.unfinished else str(finished)


def _steps(one: Group) -> str:
    if len(one.records) == 1:
        return one.records[0].progress
    steps = sorted({record.num_steps for record in one.counted})
    return str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"


def _mean(values: Sequence[float]) -> str:
    return str(estimate(values)) if values else ""


def _last(one: Group, name: str) -> str:
    values = [value for record in one.counted if (value := record.last(name)) is not None]
    finite = [value for value in values if math.isfinite(value)]
    return _mean(finite or values[:1])


def _differences(groups: Sequence[Group]) -> tuple[str, list[str], str]:
    """Returns title, cells and note of the differences in the task's own score between guided runs and unguided."""
    bases = [unguided(one, groups) for one in groups]
    headlines = (record.headline for one in groups for record in one.records)
    score = next((name for name in headlines if name is not None), "")
    found = [
        paired_difference(one.scores(score), base.scores(score)) if base is not None else None
        for one, base in zip(groups, bases, strict=True)
    ]
    labels = [base.label if base is not None else "" for base in bases]
    single = len({label for label in labels if label}) == 1
    cells = [
        "" if difference is None else str(difference) if single else f"{difference} to {label}"
        for difference, label in zip(found, labels, strict=True)
    ]
    title = f"{score}, difference" + (f" to {max(labels)}" if single else "")
    note = (
        "A difference is the mean over runs of the same seed; in brackets its 95 % bootstrap interval over seeds, "
        "which is too narrow for fewer than about ten."
    )
    return title, cells, note


def _published(groups: Sequence[Group]) -> tuple[str, list[str], str]:
    cells = [one.records[0].recipe.published.get(one.records[0].recipe.variant, "") for one in groups]
    return "paper", cells, "paper: the number in the paper, on its data, at its size and in its unit."
