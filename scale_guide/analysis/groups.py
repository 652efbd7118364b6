"""Runs by recipe, variant and settings, the seeds of each together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scale_guide.analysis.records import Record
from scale_guide.config import Recipe


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone.

    Attributes:
        recipe: Name of the recipe.
        label: The variant, and those settings in which others of its name differ.
        settings: Dotted name -> value, of all that decides the outcome but the seed.
        records: The runs, by seed.
    """

    recipe: str
    label: str
    settings: Mapping[str, Any]
    records: Sequence[Record]

    @property
    def is_guided(self) -> bool:
        """Whether a guide has any part in it."""
        return self.records[0].recipe.guidance.needs_guide

    @property
    def counted(self) -> Sequence[Record]:
        """The finished runs; all, as they stand, while none has finished."""
        return [record for record in self.records if record.state == "finished"] or self.records

    @property
    def unfinished(self) -> str:
        """What is not at its end: "120 of 500, running", or of several seeds "1 running, 2 stopped"."""
        if len(self.records) == 1:
            return "" if self.records[0].state == "finished" else self.records[0].progress
        states = [record.state for record in self.records]
        return ", ".join(f"{states.count(s)} {s}" for s in ("running", "stopped") if s in states)

    def scores(self, name: str) -> dict[int, float]:
        """Returns seed -> validation score, where it is a finite number."""
        found = {record.seed: record.scores.get(name, math.nan) for record in self.counted}
        return {seed: value for seed, value in found.items() if math.isfinite(value)}


def group(records: Sequence[Record]) -> tuple[list[Group], list[str]]:
    """Returns the records in groups, and a sentence for each seed that is there twice or lacks.

    Recipes are in the order of the records, the groups of each in the order in which they were begun.
    """
    recipes = list(dict.fromkeys(record.recipe.name for record in records))
    members: dict[tuple[str, str, str], list[Record]] = {}
    for record in sorted(records, key=lambda one: (recipes.index(one.recipe.name), _started(one))):
        key = (record.recipe.name, _variant(record), repr(sorted(_settings(record.recipe).items())))
        members.setdefault(key, []).append(record)
    groups, problems = [], []
    for (recipe, variant, _), found in members.items():
        twins = [_settings(others[0].recipe) for (*name, _), others in members.items() if name == [recipe, variant]]
        settings = _settings(found[0].recipe)
        label = ", ".join([variant, *_own(settings, twins)])
        by_seed: dict[int, Record] = {}
        for record in sorted(found, key=lambda one: (one.state == "finished", _started(one))):
            if record.seed in by_seed:
                problems.append(f"{by_seed[record.seed].path}: left out, {record.path} is the same run once more.")
            by_seed[record.seed] = record
        groups.append(Group(recipe, label, settings, [by_seed[seed] for seed in sorted(by_seed)]))
    return groups, problems + _lacking(groups)


def unguided(one: Group, groups: Sequence[Group]) -> Group | None:
    """Returns the group that shows what the guide changed: without one, the same task and target, all else nearest."""
    if not one.is_guided:
        return None
    alike = [g for g in groups if g.recipe == one.recipe and not g.is_guided]
    alike = [g for g in alike if _differing(g, one, "task", "target") == 0]
    return min(alike, key=lambda g: _differing(g, one, "optimizer", "training"), default=None)


def _variant(record: Record) -> str:
    return record.recipe.variant or record.recipe.name or record.path.name


def _started(record: Record) -> str:
    return str(record.environment.get("started", ""))


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Returns what decides the outcome but the seed, by dotted name; not how it is launched, logged and stored."""
    whole = asdict(recipe)
    kept = {part: whole[part] for part in ("task", "target", "optimizer")}
    kept["training"] = {name: whole["training"][name] for name in ("batch_size", "epochs", "steps")}
    kept["guidance"] = {name: whole["guidance"][name] for name in ("weight", "distillation")}
    if recipe.guidance.needs_guide:
        # A guide trained by an earlier variant lies in another folder for every seed.
        weights = recipe.guide.weights and Path(recipe.guide.weights).name
        kept |= {"guide": whole["guide"] | {"weights": weights}, "guidance": whole["guidance"]}
    return _flat(kept)


def _own(settings: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the settings in which others differ; those of a guide only from others that have one."""
    found = []
    for name, value in settings.items():
        default = value if name.startswith(("guide.", "guidance.")) else None
        found += [f"{name}={value}"] if any(other.get(name, default) != value for other in others) else []
    return found


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _differing(one: Group, other: Group, *parts: str) -> int:
    """Returns how many settings of these parts of a recipe differ."""
    names = (name for name in one.settings.keys() | other.settings.keys() if name.partition(".")[0] in parts)
    return sum(one.settings.get(name) != other.settings.get(name) for name in names)


def _lacking(groups: Sequence[Group]) -> list[str]:
    """Returns a sentence for each group without a run of a seed that another group of its recipe has."""
    found = []
    for one in groups:
        seeds = {record.seed for other in groups if other.recipe == one.recipe for record in other.records}
        missing = sorted(seeds - {record.seed for record in one.records})
        if missing:
            name = " ".join(dict.fromkeys([one.recipe, one.label])).strip()
            found.append(f"{name}: no run of seed {', '.join(map(str, missing))}.")
    return found
