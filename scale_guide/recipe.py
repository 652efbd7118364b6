"""A YAML file and a command line -> a checked Recipe, and its variants."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from scale_guide import lookup
from scale_guide.config import Recipe
from scale_guide.guide_weights import weights_file


class Option(NamedTuple):
    """An option of one command beside the recipe's: its default, whose type is its own (bool: a flag), and --help."""

    default: int | bool | str
    help: str


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
    parser.add_argument(
        "--config",
        action="config",
        help="Name of a shipped recipe or flavour, or a YAML file. Several are read in their order: a later one "
        "changes what it names, e.g. --config quickstart --config as_released. A mapping of free names in it "
        "(options, variants) replaces the earlier one; `target.options.width: 64` sets one entry. Options on the "
        "command line come last, wherever they stand.",
    )
    parser.add_class_arguments(Recipe)
    return parser


def read_recipe(
    command: str, arguments: Sequence[str], extra: Mapping[str, Option] | None = None
) -> tuple[Recipe, dict[str, Any]]:
    """Returns the recipe of a command line, and the values of the command's own options.

    Args:
        command: Name of the command, for messages.
        arguments: What follows the command.
        extra: The command's own options by name.

    Raises:
        ValueError: an unknown recipe or option (the closest is named), or a value of the wrong type.
    """
    extra = dict(extra or {})
    given, configs, taken = list(arguments), [], set[int]()
    known = _names(Recipe) | dict.fromkeys([*extra, "config", "help", "print_config"], False)
    names: list[str] = []
    for i, word in enumerate(given):
        if not word.startswith("--"):
            continue
        name, _, value = word[2:].partition("=")
        _check_name(name, known, "--")
        if name == "config":
            following = given[i + 1] if i + 1 < len(given) else ""
            path = lookup.recipe_path(value or following)
            taken |= {i} if value else {i, i + 1}
            names.append(lookup.recipe_name(path))
            tree = _read_yaml(path)
            _check_tree(tree, known, f"{path}: ")
            configs += _as_arguments(path, tree)
    parser = make_parser(command)
    for name, option in extra.items():
        kind: dict[str, Any] = {"action": "store_true"} if option.default is False else {"type": type(option.default)}
        parser.add_argument(f"--{name}", default=option.default, help=option.help, **kind)
    # First, wherever it stood: otherwise it would silently win over the options before it.
    values = _parse(parser, configs + [word for i, word in enumerate(given) if i not in taken])
    chosen = {name: values.pop(name) for name in extra}
    recipe = _build(Recipe, values)
    name = recipe.name or "_".join(names) or "default"
    return dataclasses.replace(recipe, name=name, run_dir=recipe.run_dir or f"runs/{name}"), chosen


def _as_arguments(path: Path, tree: Mapping[str, Any]) -> list[str]:
    """Returns what a recipe's file says as arguments; a dotted name in it is the option of that name."""
    dotted = {name: value for name, value in tree.items() if "." in name}
    if not dotted:
        return [f"--config={path}"]
    nested = {name: value for name, value in tree.items() if name not in dotted}
    found = [f"--config={yaml.safe_dump(nested, sort_keys=False)}"] if nested else []
    return found + [f"--{n}={v if isinstance(v, str) else json.dumps(v)}" for n, v in dotted.items()]


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
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]) and not isinstance(value, Mapping):
            raise ValueError(f"{name}={value!r} must be a mapping of its fields. Is the file cut short?")
    nested = {n: _build(hints[n], v) if dataclasses.is_dataclass(hints[n]) else v for n, v in values.items()}
    return kind(**nested)


def variants(recipe: Recipe, *, only: str = "") -> dict[str, Recipe]:
    """Returns the recipe of every variant by name, each with its own folder; {"": recipe} when there are none.

    A guide.weights that names an earlier variant becomes that variant's folder.

    Args:
        recipe: May hold variants.
        only: Names of the variants wanted, with commas between; empty: all.

    Raises:
        ValueError: an override that names no option, or gives a value of the wrong type; an unknown variant; or
            guide.weights of a variant that does not come before.
    """
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    for name in wanted:
        if name not in recipe.variants:
            raise lookup.unknown("--only: variant", name, recipe.variants)
    if not recipe.variants:
        return {"": recipe}
    known = _names(Recipe)
    found: dict[str, Recipe] = {}
    for name, overrides in recipe.variants.items():
        values = dataclasses.asdict(recipe) | {"variants": {}, "variant": name}
        values["run_dir"] = str(Path(recipe.run_dir) / name)
        for option, value in overrides.items():
            _check_name(option, known, f"variants.{name}: ")
            *path, last = option.split(".")
            inner = values
            for part in path:
                inner = inner[part]
            inner[last] = value
        variant = _build(Recipe, _parse(make_parser("train"), values))
        found[name] = _with_weights(name, variant, found, recipe.variants)
    return {name: variant for name, variant in found.items() if name in wanted or not wanted}


def _with_weights(name: str, variant: Recipe, earlier: Mapping[str, Recipe], known: Mapping[str, Any]) -> Recipe:
    """Returns the variant with guide.weights as a place, if it named an earlier variant."""
    weights = variant.guide.weights
    if weights is None or not variant.guidance.needs_guide:
        return variant
    if weights in earlier:
        guide = dataclasses.replace(variant.guide, weights=earlier[weights].run_dir)
        return dataclasses.replace(variant, guide=guide)
    if weights in known:
        raise ValueError(
            f"variants.{name}: guide.weights={weights!r} is a variant that is not trained before {name!r}. Write "
            f"{weights!r} above it in the recipe."
        )
    return variant


def check_guide_weights(chosen: Mapping[str, Recipe], known: Mapping[str, Any]) -> None:
    """Checks that the weights of every guide are there, or will be when it is built.

    Args:
        chosen: The variants to train, in their order.
        known: All variants of the recipe.

    Raises:
        ValueError: weights that are nowhere.
    """
    trained: set[str] = set()
    for variant in chosen.values():
        weights = variant.guide.weights
        if weights is not None and variant.guidance.needs_guide and weights not in trained:
            try:
                weights_file(weights)
            except ValueError as error:
                names = f"{', '.join(known) or 'none'}{lookup.closest(Path(weights).name, known)}"
                raise ValueError(f"{error} Variants of this recipe: {names}.") from error
        trained.add(variant.run_dir)


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
