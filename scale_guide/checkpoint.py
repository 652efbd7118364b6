"""Checkpoints that are either whole or not there: written under a temporary name, renamed when every file is in place.

run_dir/checkpoints/step_00000100/   what the engine writes, and manifest.json, which is written last
run_dir/checkpoints/step_00000200.partial/   left by a killed save; ignored, and removed by the next run
"""

from __future__ import annotations

import json
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
from scale_guide.manifest import (
    checkpoint_folders,
    checksums,
    damage,
    read_manifest,
    step_of,
    whole_checkpoints,
    write_manifest,
)

PARTIAL = ".partial"


class SaveError(OSError):
    """The run's last state could not be written."""


def identity(recipe: Recipe, engine: Engine, guide_hash: str | None) -> dict[str, Any]:
    """Returns, by dotted name, everything that a checkpoint and the run that reads it must have in common.

    The science of the recipe, the hash of the guide, and the engine, of which the format depends; the number of
    processes, how statistics travel and where the guide lives are free.
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
    family = "DDP" if engine.name == "single" else engine.name
    flat = _flatten(parts) | {"guide hash": guide_hash, "engine": family}
    return json.loads(json.dumps(flat))  # type: ignore[no-any-return]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        nested = isinstance(value, Mapping) and value
        flat |= _flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


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
        there = checkpoint_folders(self.run_dir)
        if resume == "never":
            held = (self.run_dir / "config.yaml").exists() or bool(there)
            fix = "Give another --run_dir, or continue it with --resume auto."
            return "", f"resume=never: run_dir={str(self.run_dir)!r} already holds a run. {fix}" if held else ""
        if resume != "auto":
            problem = damage(Path(resume), thorough=True)
            whole = ", ".join(map(str, whole_checkpoints(self.run_dir))) or "none"
            told = f"resume={resume!r} is not a whole checkpoint: it {problem}. Whole ones here: {whole}."
            return self._fitting(Path(resume)) if not problem else ("", f"{told} Give one of them, or --resume auto.")
        damaged: list[str] = []
        for folder in reversed(there):
            problem = damage(folder, thorough=True)
            if not problem:
                for text in damaged:
                    print(f"scale-guide: {text}; going on from {folder.name}.", flush=True)
                return self._fitting(folder)
            damaged.append(f"{folder} is damaged: it {problem}")
        fix = "No other is whole. Give another --run_dir, or move the folder `checkpoints` away to start anew."
        return "", f"{'; '.join(damaged)}. {fix}" if damaged else ""

    def _fitting(self, folder: Path) -> tuple[str, str]:
        return str(folder), self.mismatch(folder, read_manifest(folder))

    def mismatch(self, found: Path, manifest: Mapping[str, Any]) -> str:
        """Returns why this run cannot go on from a checkpoint with this manifest; "" if it can."""
        ours, theirs = self.identity, manifest["identity"]
        names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
        if not names:
            return self._mismatched_processes(found, manifest["num_processes"])
        listed = "; ".join(f"{n} was {theirs.get(n)!r} and is now {ours.get(n)!r}" for n in names[:5])
        more = f" (and {len(names) - 5} more)" if len(names) > 5 else ""
        return (
            f"resume: the checkpoint {found} was made with another configuration: {listed}{more}. "
            "Give another --run_dir, or the old values."
        )

    def _mismatched_processes(self, found: Path, before: int) -> str:
        optimizer, now = self.identity.get("optimizer.name"), self.engine.world_size
        sharded = self.identity["engine"] in ("ZeRO-1", "ZeRO-2", "ZeRO-3")
        if before == now or not sharded or optimizer in ("adam", "adamw"):
            return ""
        there = "is 1" if now == 1 else f"are {now}"
        return (
            f"resume: the checkpoint {found} was made by {before} processes, and now there {there}. With ZeRO only "
            f"adam and adamw go on with another number, not optimizer.name={optimizer!r}. Launch {before} processes."
        )

    def load(self, folder: Path) -> int:
        """Loads a checkpoint into the prepared target and optimizer; returns its step. Collective."""
        manifest = read_manifest(folder)
        step, before = int(manifest["step"]), int(manifest["num_processes"])
        scratch = self.folder / f"{folder.name}.universal{PARTIAL}"
        self.engine.load_state(folder, num_processes=before, scratch=scratch)
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
        sums, problem = self._checksums(partial)
        if self._failed(problem, partial):
            return False
        return not self._failed(self._publish(partial, final, step, sums) if self.engine.is_main else "", partial)

    def _make_room(self, partial: Path) -> str:
        if not self.engine.is_main:
            return ""
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as error:
            return str(error)
        return ""

    def _checksums(self, partial: Path) -> tuple[dict[str, str], str]:
        """Returns the checksums of all files, each read by one rank, and why this rank failed or "". Collective."""
        names = sorted(str(f.relative_to(partial)) for f in partial.rglob("*") if f.is_file())
        names = self.engine.gather_list(names if self.engine.is_main else [])
        own: dict[str, str] = {}
        problem = ""
        try:
            own = checksums(partial, names[self.engine.rank :: self.engine.world_size])
        except OSError as error:
            problem = str(error)
        return dict(self.engine.gather_list(list(own.items()))), problem

    def _publish(self, partial: Path, final: Path, step: int, sums: dict[str, str]) -> str:
        facts = {"step": step, "num_processes": self.engine.world_size, "identity": self.identity}
        try:
            write_manifest(partial, facts, sums)
            if final.exists():
                _remove(final)
            partial.rename(final)
        except OSError as error:
            return str(error)
        try:
            for old in whole_checkpoints(self.run_dir)[: -self.keep]:
                _remove(old)
        except OSError as error:
            warnings.warn(f"An old checkpoint could not be removed ({error}).", stacklevel=3)
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
