"""A name on the command line -> the thing it names: a file of this package, or `package.module:callable`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import traceback
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


def is_path(name: str) -> bool:
    """Returns whether `name` is the path of a Python file rather than the name of a file of this package."""
    return name.endswith(".py")


def module(kind: str, name: str) -> ModuleType:
    """Returns the module behind `name`: a file of the folder `kind`, or the file at a path that ends in .py.

    Raises:
        ValueError: no such file (the known names are listed and the closest is named), or one that fails on import.
    """
    if is_path(name):
        return _module_at(kind, Path(name))
    if name not in names(kind):
        raise unknown(kind, name, names(kind))
    return importlib.import_module(f"{__package__}.{kind}.{name}")


# What running a file's top level raises, short of an exit.
_IMPORT_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


def _module_at(kind: str, path: Path) -> ModuleType:
    """Returns the module made of a user's file. It is run anew each time, so an edited file counts."""
    path = path.expanduser().resolve()
    if not path.is_file():
        raise ValueError(
            f"{kind}: there is no file {path}. Give its path from the current folder or from the root, or one of "
            f"{', '.join(names(kind))}."
        )
    # Dataclasses and pickle look a module up by its name.
    spec = importlib.util.spec_from_file_location(re.sub(r"\W", "_", str(path)), path)
    assert spec is not None, "the name ends in .py"
    assert spec.loader is not None, "a file has a loader"
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    try:
        spec.loader.exec_module(made)
    except _IMPORT_ERRORS as error:
        del sys.modules[spec.name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        raise ValueError(
            f"{kind}: {path}{where} fails on import: {type(error).__name__}: {error}. Mend the file."
        ) from error
    return made


def find(kind: str, name: str) -> Callable[..., Any]:
    """Returns the callable behind `name`: the `build` of a file of the folder `kind`, or `package.module:callable`.

    Raises:
        ValueError: no such file, module or attribute; the known names are listed and the closest is named.
    """
    if ":" not in name:
        holder = module(kind, name)
        if not hasattr(holder, "build"):
            raise ValueError(f"{kind}: {name} has no function `build`. Write one that returns what it is to make.")
        return holder.build  # type: ignore[no-any-return]
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

    A shipped one goes by its path there, or by its file's name alone where no other has it.

    Raises:
        ValueError: neither a file nor a shipped recipe; the known names are listed and the closest is named.
    """
    if Path(name).is_file():
        return Path(name)
    folder = PACKAGE / "recipes"
    files = sorted(folder.rglob("*.yaml"))
    stems = [path.stem for path in files]
    known = {str(path.relative_to(folder).with_suffix("")): path for path in files}
    known |= {path.stem: path for path in files if stems.count(path.stem) == 1}
    if name not in known:
        raise unknown("--config: recipe", name, known)
    return known[name]


def recipe_name(path: Path) -> str:
    """Returns the name of the recipe in a file, e.g. imagenet/deep_fcn; a flavour or a user's has its file's."""
    shipped = PACKAGE / "recipes"
    inside = path.is_relative_to(shipped) and path.parent.name != "flavours"
    return path.relative_to(shipped).with_suffix("").as_posix() if inside else path.stem
