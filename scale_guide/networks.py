"""Networks by what a user calls them: a run folder, or a model with trained weights or without."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scale_guide import lookup
from scale_guide.build import CALIBRATION_ROWS, build_guide, first_inputs, make_network
from scale_guide.checkpoint import load_target
from scale_guide.config import Recipe, TargetConfig
from scale_guide.guide import Guide
from scale_guide.guide_weights import load_weights
from scale_guide.recipe import load_recipe
from scale_guide.tasks import Task


@dataclass(frozen=True)
class Network:
    """A frozen network, ready to run.

    Attributes:
        module: Where its layers are found.
        layers: weights | blocks | released | a list of names or globs.
        forward: A batch's input -> its output.
    """

    module: nn.Module
    layers: str | list[str]
    forward: Callable[[Any], Any]


@dataclass(frozen=True)
class Source:
    """What a word of the command line means.

    Attributes:
        label: What to call it.
        recipe: The run's; of a model one that names it.
        weights: Trained weights of a model, as guide.weights takes them; None: initialised only, from seed 0.
        run: The run folder, whose target is meant.
    """

    label: str
    recipe: Recipe
    weights: str | None = None
    run: Path | None = None


def find_network(word: str) -> Source:
    """Returns what `word` means: a run folder, MODEL or MODEL=WEIGHTS.

    Raises:
        ValueError: no run and no model of that name (the known ones are listed), or a model that cannot be imported.
    """
    if (Path(word) / "config.yaml").is_file():
        return Source(word, load_recipe(Path(word)), run=Path(word))
    model, _, weights = word.partition("=")
    if ":" not in model and model not in lookup.names("models"):
        inside = sorted(str(path.parent) for path in Path(word).glob("*/config.yaml"))
        if inside:
            raise ValueError(f"{word!r} holds several runs: give one of {', '.join(inside)}.")
        names = lookup.names("models")
        raise ValueError(
            f"{word!r} is no run folder (no config.yaml in it) and no model{lookup.closest(model, names)}. Give a run "
            f"folder, package.module:callable, or one of {', '.join(names)}; =WEIGHTS may follow a model."
        )
    lookup.find("models", model)
    return Source(word, Recipe(target=TargetConfig(name=model)), weights=weights or None)


def open_network(source: Source, task: Task, device: torch.device, *, trained: bool = True) -> Network:
    """Returns the network of a source in evaluation mode: of a run, its target.

    Args:
        source: What `find_network` returned.
        task: Supplies what a model asks for by name, such as num_classes; a finished run's own task goes before.
        device: Where it is to be.
        trained: Of a run, its newest weights; False: as it was initialised, but for BatchNorm, which has no statistics
            yet and takes those of the first training samples.

    Raises:
        ValueError: options or weights that do not fit, or a run that has no weights yet.
    """
    config, facts = source.recipe.target, task.facts
    description = source.run / "target" / "config.json" if source.run is not None else None
    if description is not None and description.exists():
        facts = json.loads(description.read_text())["facts"]
    module = make_network(config, facts, seed=source.recipe.training.seed, field="target")
    if not trained:
        initial = Guide(module, dtype="fp32", batch_norm="calibrate", device=device)
        initial.calibrate(first_inputs(source.recipe, task, CALIBRATION_ROWS))
        return Network(initial.model, config.layers, initial)
    if source.run is not None:
        try:
            load_target(module, source.run)
        except RuntimeError as error:
            raise ValueError(
                f"{source.label}: its weights do not fit the target that its recipe builds for this task. Give the "
                "data that it was trained on."
            ) from error
    elif source.weights is not None:
        try:
            load_weights(module, source.weights, config.name)
        except ValueError as error:
            raise ValueError(f"{source.label}: {error}") from error
    module.to(device).eval().requires_grad_(False)
    return Network(module, config.layers, module)


def open_guide(source: Source, task: Task, device: torch.device) -> Network:
    """Returns the guide of a run, as the run builds it.

    Raises:
        ValueError: weights that are not there or do not fit.
    """
    guide = build_guide(source.recipe, task, device)
    return Network(guide.model, source.recipe.guide.layers, guide)
