"""What makes a folder a whole checkpoint: a manifest, written last, of every file's size and checksum."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 2
_CHUNK_BYTES = 2**24


def step_of(folder: Path) -> int:
    """Returns the step in a checkpoint's name."""
    return int(folder.name.removeprefix("step_"))


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """Returns what is named like a checkpoint, whole or not, oldest first."""
    found = [f for f in (run_dir / "checkpoints").glob("step_*") if f.name.removeprefix("step_").isdigit()]
    return sorted(found, key=step_of)


def whole_checkpoints(run_dir: Path) -> list[Path]:
    """Returns the checkpoints whose files are all there, of the right size, oldest first."""
    return [folder for folder in checkpoint_folders(run_dir) if not damage(folder)]


def checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Returns file -> CRC-32 of its content, which any changed bit changes; it does not guard against forgery.

    Raises:
        OSError: a file that cannot be read.
    """
    found = {}
    for name in names:
        value = 0
        with (folder / name).open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                value = zlib.crc32(chunk, value)
        found[name] = f"{value:08x}"
    return found


def write_manifest(folder: Path, facts: Mapping[str, Any], sums: Mapping[str, str]) -> None:
    """Writes the manifest of files with these checksums, and has it on disk when it returns.

    Raises:
        OSError: it cannot be written.
    """
    files = {name: [(folder / name).stat().st_size, value] for name, value in sorted(sums.items())}
    with (folder / MANIFEST).open("w") as file:
        json.dump({"format": FORMAT, **facts, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns a checkpoint's manifest.

    Raises:
        ValueError: there is none, or it is not one of this version; in words that go after "it".
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"has no readable {MANIFEST}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"has a {MANIFEST} that is not of format {FORMAT}")
    files, step, identity = (manifest.get(name) for name in ("files", "step", "identity"))
    entries = files.values() if isinstance(files, dict) else [None]
    sound = all(isinstance(e, list) and len(e) == 2 and isinstance(e[0], int) for e in entries)
    if not (sound and isinstance(step, int) and isinstance(identity, dict)):
        raise ValueError(f"has a {MANIFEST} that lacks its files, its step or its identity")
    return manifest


def damage(folder: Path, *, thorough: bool = False) -> str:
    """Returns what is wrong with a checkpoint, in words that go after "it"; "" if nothing is.

    Args:
        folder: The checkpoint.
        thorough: Also read every file and compare its checksum.
    """
    try:
        files = read_manifest(folder)["files"]
    except ValueError as error:
        return str(error)
    for name, (size, value) in files.items():
        # A name from a damaged manifest may lead anywhere.
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            return f"lacks {name}"
        if path.stat().st_size != size:
            return f"has {name} in another size ({path.stat().st_size} bytes, not {size})"
        try:
            if thorough and checksums(folder, [name])[name] != value:
                return f"has {name} with another content (its checksum differs)"
        except OSError as error:
            return f"has {name}, which cannot be read ({error.strerror})"
    return ""
