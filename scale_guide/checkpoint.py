"""Checkpoints that are either whole or not there: written under a temporary name, renamed when every file is in place.

run_dir/checkpoints/step_00000100/   what Accelerate writes, and manifest.json, which is written last
run_dir/checkpoints/step_00000200.partial/   left by a killed save; ignored, and removed by the next run
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from scale_guide.config import Recipe
from scale_guide.engine import Engine

MANIFEST = "manifest.json"
PARTIAL = ".partial"
FORMAT = 1


class SaveError(OSError):
    """The run's last state could not be written."""


def identity(recipe: Recipe, engine: Engine, guide_hash: str | None) -> dict[str, Any]:
    """Returns, by dotted name, everything that a checkpoint and the run that reads it must have in common.

    The science of the recipe and the hash of the guide; how its statistics travel or where the guide lives is free.
    """
    whole = asdict(recipe)
    parts = {name: whole[name] for name in ("task", "target", "optimizer")}
    parts["training"] = {name: whole["training"][name] for name in ("batch_size", "seed")}
    falls_to_the_end = recipe.guidance.schedule != "constant" and recipe.guidance.stop_after is None
    if recipe.optimizer.schedule == "cosine" or (recipe.guidance.weight and falls_to_the_end):
        parts["training"] |= {name: whole["training"][name] for name in ("epochs", "steps")}
    if recipe.guidance.needs_guide:
        # Of the weights the hash tells more than their place, which moves with the run folder.
        parts["guide"] = {k: v for k, v in whole["guide"].items() if k not in ("placement", "weights")}
        parts["guidance"] = {k: v for k, v in whole["guidance"].items() if k != "layout"}
    else:
        parts["guidance"] = {"weight": recipe.guidance.weight}
    flat = _flatten(parts) | {"guide hash": guide_hash, "num_processes": engine.world_size, "engine": engine.name}
    return json.loads(json.dumps(flat))  # type: ignore[no-any-return]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        nested = isinstance(value, Mapping) and value
        flat |= _flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def step_of(folder: Path) -> int:
    """Returns the step in a checkpoint's name."""
    return int(folder.name.removeprefix("step_"))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Returns a checkpoint's manifest, or None when the checkpoint is not whole."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        whole = all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return manifest if whole and manifest.get("format") == FORMAT else None


def whole_checkpoints(run_dir: Path) -> list[Path]:
    """Returns the whole checkpoints of a run, oldest first."""
    folders = (run_dir / "checkpoints").glob("step_*")
    whole = [f for f in folders if f.name.removeprefix("step_").isdigit() and read_manifest(f) is not None]
    return sorted(whole, key=step_of)


def load_target(target: nn.Module, run_dir: Path) -> str:
    """Loads the weights of a run into its target; returns where they came from.

    Raises:
        ValueError: neither finished weights nor a whole checkpoint.
    """
    finished = run_dir / "target" / "model.safetensors"
    checkpoints = whole_checkpoints(run_dir)
    if (run_dir / "summary.json").exists() and finished.exists():
        state, source = load_file(finished), str(finished)
    elif checkpoints:
        state, source = _checkpoint_weights(checkpoints[-1]), f"{checkpoints[-1]} (step {step_of(checkpoints[-1])})"
    else:
        raise ValueError(f"RUN={str(run_dir)!r} holds neither finished weights nor a whole checkpoint yet.")
    target.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return source


def _checkpoint_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="pytorch_model")
    return weights


class Checkpoints:
    """Saves, finds and loads the checkpoints of one run."""

    def __init__(self, run_dir: Path, engine: Engine, *, keep: int, identity: dict[str, Any]) -> None:
        """Keeps at most `keep` checkpoints in run_dir/checkpoints, each stamped with `identity`."""
        self.folder = run_dir / "checkpoints"
        self.run_dir = run_dir
        self.engine = engine
        self.keep = max(1, keep)
        self.identity = identity

    # Loading

    def find(self, resume: str) -> Path | None:
        """Returns the checkpoint to go on from, or None to start at step 0; the same on every rank. Collective.

        Args:
            resume: auto, never, or the path of a checkpoint.

        Raises:
            ValueError: the checkpoint belongs to another configuration, guide, engine or number of processes, is not
                whole, or `never` met a folder that holds a run.
        """
        choice = [self._choose(resume)] if self.engine.is_main else []
        path, problem = self.engine.gather_list(choice)[0]
        if problem:
            raise ValueError(problem)
        return Path(path) if path else None

    def _choose(self, resume: str) -> tuple[str, str]:
        for leftover in self.folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(leftover, ignore_errors=True)
        whole = whole_checkpoints(self.run_dir)
        if resume == "never":
            held = (self.run_dir / "config.yaml").exists() or bool(whole)
            fix = "Give another --run_dir, or continue it with --resume auto."
            return "", f"resume=never: run_dir={str(self.run_dir)!r} already holds a run. {fix}" if held else ""
        if resume == "auto" and not whole:
            return "", ""
        found = whole[-1] if resume == "auto" else Path(resume)
        manifest = read_manifest(found)
        if manifest is None:
            return "", (
                f"resume={resume!r} is not a whole checkpoint. "
                f"Whole ones here: {', '.join(map(str, whole)) or 'none'}. Give one of them, or --resume auto."
            )
        return str(found), self._differences(found, manifest["identity"])

    def _differences(self, found: Path, theirs: dict[str, Any]) -> str:
        ours = self.identity
        names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
        if not names:
            return ""
        listed = "; ".join(f"{n} was {theirs.get(n)!r} and is now {ours.get(n)!r}" for n in names[:5])
        more = f" (and {len(names) - 5} more)" if len(names) > 5 else ""
        return (
            f"resume: the checkpoint {found} was made with another configuration: {listed}{more}. "
            "Give another --run_dir, or the old values."
        )

    def load(self, folder: Path) -> int:
        """Loads a checkpoint into the prepared target and optimizer; returns its step. Collective."""
        self.engine.load_state(folder)
        step = int((read_manifest(folder) or {})["step"])
        if self.engine.is_main:
            for later in [f for f in whole_checkpoints(self.run_dir) if step_of(f) > step]:
                print(f"scale-guide: {later} is later than the step resumed from and is removed.", flush=True)
                _remove(later)
        self.engine.barrier()
        return step

    # Saving

    def save(self, step: int) -> bool:
        """Saves the state after `step` steps; returns whether it is on disk. Collective.

        When any rank cannot write, the half-written folder is removed everywhere, a warning says why, and the earlier
        checkpoints stay.
        """
        final = self.folder / f"step_{step:08d}"
        partial = final.with_name(final.name + PARTIAL)
        if self._failed(self._make_room(partial), partial):
            return False
        if self._failed(self.engine.save_state(partial), partial):
            return False
        return not self._failed(self._publish(partial, final, step) if self.engine.is_main else "", partial)

    def _make_room(self, partial: Path) -> str:
        if not self.engine.is_main:
            return ""
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as error:
            return str(error)
        return ""

    def _publish(self, partial: Path, final: Path, step: int) -> str:
        files = {str(f.relative_to(partial)): f.stat().st_size for f in sorted(partial.rglob("*")) if f.is_file()}
        manifest = {"format": FORMAT, "step": step, "identity": self.identity, "files": files}
        try:
            with (partial / MANIFEST).open("w") as file:
                json.dump(manifest, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            if final.exists():
                _remove(final)
            partial.rename(final)
        except OSError as error:
            return str(error)
        for old in whole_checkpoints(self.run_dir)[: -self.keep]:
            _remove(old)
        return ""

    def _failed(self, problem: str, partial: Path) -> bool:
        """Returns whether any rank met a problem; then removes what was written. Also a barrier. Collective."""
        problems = [p for p in self.engine.gather_list([problem]) if p]
        if not problems:
            return False
        if self.engine.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            warnings.warn(
                f"checkpoint {partial.name.removesuffix(PARTIAL)} could not be written ({problems[0]}); "
                "the earlier ones stay. Free some disk space.",
                stacklevel=3,
            )
        return True


def _remove(folder: Path) -> None:
    # Renamed first: a kill in the middle of removing leaves nothing that looks like a checkpoint.
    doomed = folder.with_name(f"{folder.name}.old{PARTIAL}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
