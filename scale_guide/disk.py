"""Writes to a disk that may be full: whole or not at all, and failures that one rank can tell the others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a small file, text as UTF-8, so that it is either the old one or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".partial")
    draft.write_bytes(content.encode() if isinstance(content, str) else content)
    draft.replace(path)


def _is_write_error(error: Exception) -> bool:
    # torch's writers raise RuntimeError for a full disk; other RuntimeErrors are bugs and must be seen.
    signs = ("inline_container", "iostream error", "PytorchStreamWriter", "No space left", "write()", "File too large")
    return not isinstance(error, RuntimeError) or any(sign in str(error) for sign in signs)


def note(error: Exception, problems: list[str]) -> None:
    """Adds a failed write to `problems`; anything else is a bug and is raised again."""
    if not _is_write_error(error):
        raise error
    problems.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")


@contextlib.contextmanager
def write_errors_noted(owner: Any, name: str, problems: list[str]) -> Iterator[None]:
    """While inside, the method `owner.name` adds its failed writes to `problems` instead of raising."""
    original = getattr(owner, name)

    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:
            note(error, problems)

    setattr(owner, name, guarded)
    try:
        yield
    finally:
        delattr(owner, name)
