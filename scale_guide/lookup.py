"""A name on the command line -> the thing it names: a file of this package, or `package.module:callable`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = Path(__file__).parent


def closest(name: str, known: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" for the known name nearest to `name`, or "" when none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """Returns the error for an unknown name: it lists the known ones and names the closest."""
    names = sorted(known)
    return ValueError(f"{kind}={name!r} is not known{closest(name, names)}. Known: {', '.join(names) or 'none'}.")


def names(kind: str) -> list[str]:
    """Returns the names that the folder `kind` (models | tasks | similarity) offers, sorted."""
    folder = PACKAGE / kind
    return sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_"))


def module(kind: str, name: str) -> ModuleType:
    """Returns the module behind `name`: a file of the folder `kind`.

    Raises:
        ValueError: no such file; the known names are listed and the closest is named.
    """
    if name not in names(kind):
        raise unknown(kind, name, names(kind))
    return importlib.import_module(f"{__package__}.{kind}.{name}")


def find(kind: str, name: str) -> Callable[..., Any]:
    """Returns the callable behind `name`: the `build` of a file of the folder `kind`, or `package.module:callable`.

    Raises:
        ValueError: no such file, module or attribute; the known names are listed and the closest is named.
    """
    if ":" not in name:
        return module(kind, name).build  # type: ignore[no-any-return]
    path, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(path)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{kind}={name!r}: the module {path!r} cannot be imported ({error}). "
            "Install it, or put its folder on PYTHONPATH."
        ) from error
    if not callable(getattr(found, attribute, None)):
        raise unknown(f"{kind}: {path}", attribute, [n for n, v in vars(found).items() if callable(v)])
    return getattr(found, attribute)  # type: ignore[no-any-return]


def call(build: Callable[..., Any], options: Mapping[str, Any], facts: Mapping[str, Any], *, field: str) -> Any:
    """Returns build(**options), together with those `facts` that it names and `options` does not set.

    Args:
        build: What `find` returned.
        options: The user's keyword arguments.
        facts: What the task knows and a model may ask for by name: num_classes, input_shape, vocab_size, ...
        field: Name of the recipe's field that holds `options`, for the message.

    Raises:
        ValueError: an option that `build` does not have, or one missing that it needs.
    """
    parameters = inspect.signature(build).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for option in options:
        if option not in parameters and not open_ended:
            raise unknown(f"{field}: option", option, parameters)
    given = {**{name: value for name, value in facts.items() if name in parameters}, **options}
    missing = [
        n for n, p in parameters.items() if p.default is p.empty and p.kind is p.KEYWORD_ONLY and n not in given
    ]
    if missing:
        raise ValueError(f"{field} lacks {', '.join(missing)}: this task does not supply it. Set it under {field}.")
    return build(**given)


def recipe_path(name: str) -> Path:
    """Returns the YAML file of a recipe: a path as it is, or the name of one shipped in scale_guide/recipes.

    Raises:
        ValueError: neither a file nor a shipped recipe; the known names are listed and the closest is named.
    """
    if Path(name).is_file():
        return Path(name)
    folder = PACKAGE / "recipes"
    known = {str(p.relative_to(folder).with_suffix("")): p for p in folder.rglob("*.yaml")}
    if name not in known:
        raise unknown("--config: recipe", name, known)
    return known[name]
