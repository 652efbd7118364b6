"""The commands, and what they share: reading a recipe and building what it names."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from safetensors.torch import load_file
from torch import nn

from scale_guide import lookup
from scale_guide.config import Recipe
from scale_guide.data_order import SeededDataset
from scale_guide.guide import Guide
from scale_guide.layer_map import LayerMap, trace, trace_layers
from scale_guide.tasks import Task

CALIBRATION_ROWS = 256


class UserError(Exception):
    """A ValueError met while setting up: shown as one line, without a traceback."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Around set-up: turns ValueErrors, which are the user's to mend, into one line and exit code 2."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


# Recipes


def _names(kind: type, prefix: str = "") -> dict[str, bool]:
    """Returns the dotted names of a dataclass's fields; True for one that holds free names (a dict)."""
    found: dict[str, bool] = {}
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            found |= {f"{prefix}{name}": False} | _names(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            found[f"{prefix}{name}"] = str(hint).startswith("dict")
    return found


def _check_name(name: str, known: Mapping[str, bool], where: str) -> None:
    if name in known or any(is_open and name.startswith(f"{parent}.") for parent, is_open in known.items()):
        return
    raise ValueError(
        f"{where}{name} is not an option{lookup.closest(name, known)}. "
        "`scale-guide train --help` lists them; `--print_config` shows a whole recipe."
    )


def _check_tree(tree: Mapping[str, Any], known: Mapping[str, bool], where: str, prefix: str = "") -> None:
    for name, value in tree.items():
        _check_name(f"{prefix}{name}", known, where)
        if isinstance(value, Mapping) and not known.get(f"{prefix}{name}", True):
            _check_tree(value, known, where, f"{prefix}{name}.")


def make_parser(command: str) -> ArgumentParser:
    """Returns the parser of a command that takes a recipe."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=f"scale-guide {command}", exit_on_error=False)
    parser.add_argument("--config", action="config", help="Name of a shipped recipe, or a YAML file.")
    parser.add_class_arguments(Recipe)
    return parser


def read_recipe(
    command: str, arguments: Sequence[str], extra: Mapping[str, int] | None = None
) -> tuple[Recipe, dict[str, int]]:
    """Returns the recipe of a command line, and the values of the command's own integer options.

    Args:
        command: Name of the command, for messages.
        arguments: What follows the command.
        extra: The command's own options: name -> default.

    Raises:
        ValueError: an unknown recipe or option (the closest is named), or a value of the wrong type.
    """
    extra = dict(extra or {})
    given, configs, taken = list(arguments), [], set[int]()
    known = _names(Recipe) | dict.fromkeys([*extra, "config", "help", "print_config"], False)
    default_dir = "runs/default"
    for i, word in enumerate(given):
        if not word.startswith("--"):
            continue
        option, _, value = word[2:].partition("=")
        _check_name(option, known, "--")
        if option == "config":
            following = given[i + 1] if i + 1 < len(given) else ""
            path = lookup.recipe_path(value or following)
            taken |= {i} if value else {i, i + 1}
            configs.append(f"--config={path}")
            default_dir = f"runs/{path.stem}"
            _check_tree(_read_yaml(path), known, f"{path}: ")
    parser = make_parser(command)
    for name, default in extra.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    # First, wherever it stood: otherwise it would silently win over the options before it.
    values = _parse(parser, configs + [word for i, word in enumerate(given) if i not in taken])
    chosen = {name: int(values.pop(name)) for name in extra}
    recipe = _build(Recipe, values)
    return dataclasses.replace(recipe, run_dir=recipe.run_dir or default_dir), chosen


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no recipe: a YAML mapping such as `task: ...` is expected.")
    return tree


def _parse(parser: ArgumentParser, given: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    try:
        found = parser.parse_object(dict(given)) if isinstance(given, Mapping) else parser.parse_args(list(given))
    except ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from error
    values: dict[str, Any] = found.as_dict()
    values.pop("config", None)
    return values


def _build(kind: type, values: Mapping[str, Any]) -> Any:
    hints = get_type_hints(kind)
    nested = {n: _build(hints[n], v) if dataclasses.is_dataclass(hints[n]) else v for n, v in values.items()}
    return kind(**nested)


def variants(recipe: Recipe) -> dict[str, Recipe]:
    """Returns the recipe of every variant by name, each with its own folder; {"": recipe} when there are none.

    Raises:
        ValueError: an override that names no option, or gives a value of the wrong type.
    """
    if not recipe.variants:
        return {"": recipe}
    known, found = _names(Recipe), {}
    for name, overrides in recipe.variants.items():
        values = dataclasses.asdict(recipe) | {"variants": {}, "run_dir": str(Path(recipe.run_dir) / name)}
        for option, value in overrides.items():
            _check_name(option, known, f"variants.{name}: ")
            *path, last = option.split(".")
            inner = values
            for part in path:
                inner = inner[part]
            inner[last] = value
        found[name] = _build(Recipe, _parse(make_parser("train"), values))
    return found


def load_recipe(run_dir: Path) -> Recipe:
    """Returns the recipe of a run folder.

    Raises:
        ValueError: the folder holds no run.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        inner = sorted(str(p.parent) for p in run_dir.glob("*/config.yaml"))
        fix = f"Give one of {', '.join(inner)}." if inner else "Give the run_dir of a run."
        raise ValueError(f"RUN={str(run_dir)!r} holds no config.yaml. {fix}")
    return _build(Recipe, _parse(make_parser("train"), _read_yaml(path)))  # type: ignore[no-any-return]


# What a recipe names


def build_task(recipe: Recipe) -> Task:
    """Returns the task.

    Raises:
        ValueError: an unknown task or option, or data that cannot be read.
    """
    found: Task = lookup.call(lookup.find("tasks", recipe.task.name), recipe.task.options, {}, field="task.options")
    return found


def build_network(kind: str, recipe: Recipe, task: Task) -> nn.Module:
    """Returns the network of the recipe's field `kind` (target | guide), initialised from its own seed.

    Raises:
        ValueError: an unknown model or option, or one that is no network.
    """
    config = recipe.target if kind == "target" else recipe.guide
    with torch.random.fork_rng():
        torch.manual_seed(recipe.training.seed if kind == "target" else recipe.guide.seed)
        network = lookup.call(lookup.find("models", config.name), config.options, task.facts, field=f"{kind}.options")
    if not isinstance(network, nn.Module):
        raise ValueError(f"{kind}.name={config.name!r} builds a {type(network).__name__}; it must build an nn.Module.")
    return network


def build_guide(recipe: Recipe, task: Task, device: torch.device) -> Guide:
    """Returns the frozen guide, with its trained weights if the recipe names any.

    Raises:
        ValueError: an unknown model or option, or weights that do not fit.
    """
    network = build_network("guide", recipe, task)
    if recipe.guide.weights is not None:
        _load_weights(network, Path(recipe.guide.weights))
    guide = Guide(
        network,
        dtype=recipe.guide.dtype,
        batch_norm=recipe.guide.batch_norm,
        device=torch.device("cpu") if recipe.guide.placement == "cpu" else device,
    )
    if recipe.guide.batch_norm == "calibrate":
        samples = SeededDataset(task.train, recipe.training.seed)
        rows = min(CALIBRATION_ROWS, recipe.training.batch_size, len(task.train))
        guide.calibrate(task.collate([samples[0, i] for i in range(rows)])["input"])
    return guide


def _load_weights(network: nn.Module, path: Path) -> None:
    file = path / "target" / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"guide.weights={str(path)!r}: {file} does not exist. Give a .safetensors file or a finished run."
        )
    try:
        network.load_state_dict(load_file(file))
    except RuntimeError as error:
        raise ValueError(f"guide.weights={str(path)!r} does not fit the guide: {error}") from error


def trace_recipe(recipe: Recipe, task: Task, *, num_examples: int = 2) -> LayerMap:
    """Returns the layers of both networks and their pairs, traced on meta tensors: nothing is computed or allocated.

    Raises:
        ValueError: unknown layers, no pairs, or unequal rows. With guidance.weight 0 the guide is not looked at.
    """
    inputs = task.collate([task.train[0]] * num_examples)["input"].to("meta")
    guided = bool(recipe.guidance.weight)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # trained weights copied to meta tensors: nothing happens, loudly
        target = build_network("target", recipe, task)
        if not guided:
            return LayerMap(tuple(trace_layers(target, inputs, recipe.target.layers, recipe.guidance.rows)), (), ())
        return trace(
            target,
            build_network("guide", recipe, task),
            inputs,
            target_layers=recipe.target.layers,
            guide_layers=recipe.guide.layers,
            pairs=recipe.guidance.pairs,
            collision=recipe.guidance.collision,
            rows=recipe.guidance.rows,
        )
