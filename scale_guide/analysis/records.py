"""Run folders as they are found: finished or not, whole or damaged."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from scale_guide.config import Recipe
from scale_guide.lookup import closest
from scale_guide.recipe import load_recipe

PATIENCE_S = 600
"""A run that wrote its last line this long ago counts as stopped, unless its lines are further apart than that."""


@dataclass(frozen=True)
class Line:
    """One line of metrics.jsonl: of what it says, all that is a number.

    Attributes:
        step: Optimizer steps done.
        numbers: Top-level entries, such as task_loss.
        validation: Validation scores; empty in a line of training.
        pairs: "target <- guide" -> similarity, debiased, floor.
    """

    step: int
    numbers: Mapping[str, float]
    validation: Mapping[str, float]
    pairs: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Maps:
    """CKA of all target x guide layers, as `scale-guide similarity RUN` leaves it: rows are target layers."""

    target_layers: Sequence[str]
    guide_layers: Sequence[str]
    before: NDArray[np.float64]
    after: NDArray[np.float64]
    num_rows: int


@dataclass(frozen=True)
class Record:
    """What one run folder holds.

    Attributes:
        path: The folder.
        recipe: config.yaml.
        environment: environment.json; empty where it cannot be read.
        lines: The readable lines of metrics.jsonl, in order.
        summary: summary.json; None before the end of the run.
        maps: maps.json; None where it was not made.
        idle_s: Seconds since metrics.jsonl was last written.
    """

    path: Path
    recipe: Recipe
    environment: Mapping[str, Any]
    lines: Sequence[Line]
    summary: Mapping[str, Any] | None
    maps: Maps | None
    idle_s: float

    @property
    def seed(self) -> int:
        """training.seed."""
        return self.recipe.training.seed

    @property
    def state(self) -> Literal["finished", "running", "stopped"]:
        """Whether the run has come to its end and, if not, whether it wrote a line of late."""
        if self.summary is not None:
            return "finished"
        between_lines = self.seconds / max(len(self.lines), 1)
        return "running" if self.idle_s < max(PATIENCE_S, 3 * between_lines) else "stopped"

    @property
    def progress(self) -> str:
        """Steps done and, before the end, those to do and the state: "500", or "120 of 500, running"."""
        if self.state == "finished":
            return str(self.num_steps)
        planned = "" if self.num_planned is None else f" of {self.num_planned}"
        return f"{self.num_steps}{planned}, {self.state}"

    @property
    def num_steps(self) -> int:
        """Steps done, as far as the folder tells."""
        return max((line.step for line in self.lines), default=0)

    @property
    def num_planned(self) -> int | None:
        """Steps of the whole run; None where they follow from epochs and no line says how long those are."""
        if self.recipe.training.steps is not None:
            return self.recipe.training.steps
        epochs = next(((line.step, e) for line in self.lines if (e := line.numbers.get("epoch", 0)) > 0), None)
        return None if epochs is None else round((self.recipe.training.epochs or 0) * epochs[0] / epochs[1])

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return max((line.numbers.get("seconds", 0.0) for line in self.lines), default=0.0)

    @property
    def scores(self) -> Mapping[str, float]:
        """Validation scores at the end; before it, those measured last."""
        if self.summary is not None:
            return _numbers(self.summary.get("validation"))
        return next((line.validation for line in reversed(self.lines) if line.validation), {})

    @property
    def headline(self) -> str | None:
        """Name of the score that the task is known by; None before the end."""
        return str(self.summary["score"]) if self.summary and "score" in self.summary else None

    def last(self, name: str) -> float | None:
        """Returns what was logged last under a name; None if nothing was."""
        return next((line.numbers[name] for line in reversed(self.lines) if name in line.numbers), None)


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Returns run folders: each path itself, or all that lie below it (variants, seeds), each once, in order.

    Raises:
        ValueError: a path without any run.
    """
    found: dict[Path, None] = {}
    for path in paths:
        inside = []
        for folder, folders, files in os.walk(path):
            folders.sort()
            if {"config.yaml", "metrics.jsonl"} & set(files):
                inside.append(Path(folder))
                folders.clear()  # what lies in a run, such as a tracker's files, is no run
        if not inside:
            beside = [str(other) for other in path.parent.iterdir()] if path.parent.is_dir() else []
            raise ValueError(f"RUN={str(path)!r} holds no run (no config.yaml){closest(str(path), beside)}.")
        found |= dict.fromkeys(inside)
    return list(found)


def read_runs(paths: Sequence[Path]) -> tuple[list[Record], list[str]]:
    """Returns what the runs in and below some folders hold, and a sentence for each thing that is wrong with them.

    A run without a readable config.yaml is left out; of the others, what cannot be read.

    Raises:
        ValueError: a folder without any run.
    """
    records, problems = [], []
    for path in tqdm(find_runs(paths), desc="reading", leave=False, disable=None):
        told: list[str] = []
        record = _read_run(path, told)
        records += [record] if record is not None else []
        problems += [f"{path}: {problem}." for problem in told]
    return records, problems


def _read_run(path: Path, problems: list[str]) -> Record | None:
    try:
        recipe = load_recipe(path)
    except (OSError, ValueError) as error:
        problems.append(f"left out, for config.yaml is not a recipe's ({_short(error)})")
        return None
    environment = _read_json(path / "environment.json", problems)
    summary = _read_json(path / "summary.json", problems) if (path / "summary.json").exists() else None
    lines, idle_s = _read_lines(path / "metrics.jsonl", problems)
    record = Record(path, recipe, environment or {}, lines, summary, _read_maps(path / "maps.json", problems), idle_s)
    problems += _not_finite(record)
    if record.state != "finished":
        problems.append(f"not finished: step {record.progress}, last written {_ago(idle_s)} ago")
    return record


def _read_json(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """Returns the mapping that a file holds; None, with a problem noted, if it does not."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read ({_short(error)})")
        return None
    if isinstance(found, dict):
        return found
    problems.append(f"{path.name} holds no mapping")
    return None


def _read_lines(path: Path, problems: list[str]) -> tuple[list[Line], float]:
    """Returns the readable lines, and the seconds since the last, which may be half written or cut by a kill."""
    try:
        texts = path.read_text(errors="replace").split("\n")
        idle_s = time.time() - path.stat().st_mtime
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({_short(error)})")
        return [], math.inf
    found = [_line(text) for text in texts]
    bad = [number for number, line in enumerate(found, start=1) if line is None and texts[number - 1].strip()]
    if bad and bad[-1] == len(texts):
        problems.append(f"{path.name}: the last line is cut short and left out")
        bad.pop()
    if bad:
        more = f" and {len(bad) - 1} more are" if len(bad) > 1 else " is"
        problems.append(f"{path.name}: line {bad[0]}{more} unreadable and left out")
    return [line for line in found if line is not None], idle_s


def _line(text: str) -> Line | None:
    try:
        found = json.loads(text)
        if not isinstance(found, dict) or not isinstance(found.get("step"), int):
            return None
        pairs = found.get("pairs")
        read = {name: _numbers(pair) for name, pair in pairs.items()} if isinstance(pairs, dict) else {}
        return Line(int(float(found["step"])), _numbers(found), _numbers(found.get("validation")), read)
    except (ValueError, OverflowError, RecursionError):
        return None


def _numbers(found: Any) -> dict[str, float]:
    """Returns the entries of a mapping that are numbers; none if it is no mapping."""
    entries = found.items() if isinstance(found, dict) else ()
    return {name: float(value) for name, value in entries if isinstance(value, int | float)}


def _read_maps(path: Path, problems: list[str]) -> Maps | None:
    found = _read_json(path, problems) if path.exists() else None
    if found is None:
        return None
    try:
        names = [[str(name) for name in found[f"{side}_layers"]] for side in ("target", "guide")]
        before, after = (np.array(found[when], dtype=np.float64) for when in ("before", "after"))
        if not before.shape == after.shape == (len(names[0]), len(names[1])):
            raise ValueError(f"{before.shape} and {after.shape} numbers for {len(names[0])} x {len(names[1])} layers")
        return Maps(names[0], names[1], before, after, int(found["num_rows"]))
    except (KeyError, TypeError, ValueError) as error:
        problems.append(f"{path.name} holds no maps ({_short(error)})")
        return None


def _not_finite(record: Record) -> list[str]:
    """Returns a sentence for each loss that stops being a number, and for each score that ends as none."""
    found = []
    for name in ("task_loss", "guidance_loss", "distillation_loss"):
        logged = (line for line in record.lines if not math.isfinite(line.numbers.get(name, 0)))
        first = next(logged, None)
        found += [f"{name} is {first.numbers[name]} at step {first.step}"] if first is not None else []
    bad = [f"{name} ({value})" for name, value in record.scores.items() if not math.isfinite(value)]
    return found + ([f"validation {', '.join(bad)} is not finite and has no part in the means"] if bad else [])


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def _ago(seconds: float) -> str:
    sizes = ((86400, "days"), (3600, "h"), (60, "min"))
    size, unit = next(((size, unit) for size, unit in sizes if seconds >= 2 * size), (1, "s"))
    return f"{seconds / size:.0f} {unit}"
