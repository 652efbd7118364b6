"""Runs inside `accelerate launch` (see test_train.py): whole, interrupted and resumed runs under one engine.

Usage: accelerate launch --config_file ... tests/launched.py OUT RECIPE OPTION... and OPTION...

The options before `and` are those of two further runs, whose steps are not all alike; those after it of one more.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import scale_guide.run
from scale_guide.commands.train import set_up
from scale_guide.engine import Engine
from scale_guide.recipe import read_recipe
from scale_guide.trainer import StepLog, guided_step

OUT, RECIPE = Path(sys.argv[1]), sys.argv[2]
engine = Engine(timeout_s=600)


def go(name: str, *options: str, term_at: int | None = None) -> dict[str, Any] | None:
    """Trains into OUT/name; with `term_at` the last rank alone gets a SIGTERM then; all learn of it a step later."""

    def step(*args: Any, **kwargs: Any) -> StepLog:
        if kwargs["step"] == term_at and engine.rank == engine.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return guided_step(*args, **kwargs)

    scale_guide.run.guided_step = step
    recipe, _ = read_recipe("train", ["--config", RECIPE, "--run_dir", str(OUT / name), *options])
    run = set_up(recipe, engine)
    assert run.finished() is None, "the run has work to do"
    run.prepare()
    summary = run.run(name)
    engine.free()
    return summary


def full_disk_on_one_rank() -> dict[str, Any]:
    """Every save but the last fails on the last rank alone; the run must go on and say so."""
    saved = Engine.save_state
    calls = 0

    def save_state(self: Engine, folder: Path) -> str:
        nonlocal calls
        calls += 1
        problem = saved(self, folder)
        return "No space left on device" if calls == 2 and self.rank == self.world_size - 1 else problem

    Engine.save_state = save_state  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        go("full_disk", "--training.checkpoint_every=2")
    Engine.save_state = saved  # type: ignore[method-assign]
    left = sorted(p.name for p in (OUT / "full_disk/checkpoints").iterdir())
    return {"left": left, "warnings": [str(w.message) for w in caught]}


cut = sys.argv.index("and")
PHASES, CONTROLS = sys.argv[3:cut], sys.argv[cut + 1 :]
go("controls", *CONTROLS)
go("phases", *PHASES)
phases = [go("phases_cut", *PHASES, term_at=step) for step in (0, 5, None)]
go("whole")
interrupted = go("cut", term_at=2)
between = sorted(p.name for p in (OUT / "cut/checkpoints").iterdir())
resumed = go("cut")
facts = {
    "engine": engine.name,
    "world_size": engine.world_size,
    "interrupted": interrupted,
    "between": between,
    "resumed": resumed,
    "phases": [summary is not None for summary in phases],
}
if engine.name in ("DDP", "ZeRO-2"):
    facts["full_disk"] = full_disk_on_one_rank()
if engine.is_main:
    (OUT / "facts.json").write_text(json.dumps(facts))
engine.close()
