"""Do W processes x k micro-batches train as one process does? Every engine against a literal float64 training.

    python scripts/check_parity.py                          # 1, 2, 4 processes x DDP, ZeRO 0-3 (and DDP in float64)
    python scripts/check_parity.py --accumulation 1,3,8     # more micro-batches
    python scripts/check_parity.py --break world            # plants a bug; exits with 1, as it must

Three recipes (parity_cases.py), SGD, a global batch of 96 rows, 5 steps. For each it compares the loss of each step,
|loss - reference| / |reference|, and the *update* of each tensor, |update - reference| / |reference| with update =
values after 5 steps - values before: a parameter itself would hide an error behind a small learning rate. The
reference is plain PyTorch in one process and float64, the whole batch in one graph. The measured side is the product:
its engine, guided_step, guidance and tasks, under `accelerate launch`. Under ZeRO-2 and -3 no gradient may stay in
full size between two micro-batches of a step.

The recipe `coupled` has dropout and BatchNorm, so that its result depends on how the batch is cut. Its reference holds
the same W x k micro-batches, each with its own batch statistics and the same masks, in one graph; and the running
statistics, a mean over ranks, are compared as well: each micro-batch counts once, though it runs twice. It runs in two
layouts.

Exit code: 0 equal; 1 not equal: a difference above the tolerance (fp32: 1e-4, fp64: 1e-9), a gradient that stayed, or
weights that move by less than 1 %, which would prove nothing; 2 it could not run.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from parity_cases import BATCH_SIZE, COUPLED, RECIPES, Reference, train_literally
from parity_launch import Case, Launch, run
from parity_worker import BUGS, BUGS_OF_PROCESSES, DTYPES

ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3")
LAYOUTS = ("auto", "gather", "transpose", "covariance")
# One that keeps rows and one that runs the guide again: neither dropout nor BatchNorm knows of more.
COUPLED_LAYOUTS = ("transpose", "covariance")
TOLERANCES = {"fp32": 1e-4, "fp64": 1e-9}
MIN_MOVEMENT = 0.01
SHARDED_GRADIENTS = ("zero2", "zero3")


@dataclass(frozen=True)
class Row:
    """The largest differences of one or more cases of one launch and task, and where the update's was."""

    dtype: str
    engine: str
    processes: int
    task: str
    loss: float
    update: float
    tensor: str
    layout: str
    k: int
    kept: int

    @property
    def passes(self) -> bool:
        """Whether both are within the tolerance (NaN is not), and no sharded gradient stayed whole."""
        stayed = self.kept and self.engine in SHARDED_GRADIENTS
        return self.loss <= TOLERANCES[self.dtype] and self.update <= TOLERANCES[self.dtype] and not stayed


def main() -> int:
    """Returns the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that no launch is left behind
    options = _read_options()
    launches = _launches(options)
    cases = _cases(options)
    start = time.perf_counter()
    print(
        f"{len(launches)} launches of {len(cases)} cases; the reference trains in one process and float64", flush=True
    )
    moves = _print_movement(launches, cases)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="check_parity_") as folder:
        for number, launch in enumerate(launches, 1):
            label, began = f"[{number}/{len(launches)}] {launch}", time.perf_counter()
            results = run(launch, cases, options.bug, Path(folder), label)
            found = [_compare(launch, result, _reference(result["task"], launch, result["k"])) for result in results]
            update = max((row.update for row in found), key=_nan_last)
            print(f"{label}: updates within {update:.1e}, {time.perf_counter() - began:.0f} s", flush=True)
            rows += found
    _print_table(rows)
    if options.json:
        options.json.write_text(json.dumps({"rows": [asdict(row) for row in rows], "moved": moves}, indent=1))
    failed = [row for row in rows if not row.passes]
    print(f"{len(rows)} cases, {len(failed)} above the tolerance, {time.perf_counter() - start:.0f} s")
    if options.bug:
        print(f"planted bug {options.bug!r}: {'SEEN' if failed else 'NOT SEEN'}")
    hardly = min(min(moved.values()) for moved in moves.values()) < MIN_MOVEMENT
    return 1 if failed or hardly else 0


# Options


def _read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=_numbers, help="default 1,2,4; with --break 2")
    parser.add_argument("--engines", type=_names(ENGINES), help=f"default {','.join(ENGINES)}; with --break ddp")
    parser.add_argument("--dtype", type=_names(TOLERANCES), help="default fp32,fp64 (ddp alone); with --break fp32")
    parser.add_argument("--accumulation", type=_numbers, default=[1, 3], help="micro-batches per step, default 1,3")
    parser.add_argument("--layouts", type=_names(LAYOUTS), default=LAYOUTS, help=f"default {','.join(LAYOUTS)}")
    parser.add_argument("--tasks", type=_names(RECIPES), default=list(RECIPES), help=f"default {','.join(RECIPES)}")
    bugs = (
        "plant this bug: W missing in the gradient that goes home, rows centred per rank, task loss / local count, "
        "other dropout masks in the first pass than in the second, or BatchNorm counting in both"
    )
    parser.add_argument("--break", choices=BUGS, dest="bug", help=bugs)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    options.processes = options.processes or ([2] if options.bug else [1, 2, 4])
    options.engines = options.engines or (["ddp"] if options.bug else ENGINES)
    options.dtype = options.dtype or (["fp32"] if options.bug else list(TOLERANCES))
    if options.bug in BUGS_OF_PROCESSES and min(options.processes) < 2:
        parser.error(f"--break {options.bug} needs --processes of 2 or more: one has no other to disagree with.")
    two_passes = max(options.accumulation) > 1 and not set(COUPLED).isdisjoint(options.tasks)
    if options.bug and options.bug not in BUGS_OF_PROCESSES and not two_passes:
        parser.error(f"--break {options.bug} needs two passes, dropout and BatchNorm: --accumulation 3, task coupled.")
    if options.dtype == ["fp64"] and "ddp" not in options.engines:
        parser.error("--dtype fp64 runs under ddp alone: DeepSpeed has no float64. Add ddp to --engines.")
    for parts in (w * k for w in options.processes for k in options.accumulation):
        if BATCH_SIZE % parts:
            parser.error(
                f"the global batch has {BATCH_SIZE} rows, not a multiple of {parts} processes x micro-batches."
            )
    return options


def _numbers(text: str) -> list[int]:
    numbers = [int(word) for word in text.split(",")]
    if min(numbers) < 1:
        raise ValueError
    return numbers


def _names(known: Any) -> Any:
    def names(text: str) -> list[str]:
        for word in text.split(","):
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is not known. Known: {', '.join(known)}.")
        return text.split(",")

    return names


def _launches(options: argparse.Namespace) -> list[Launch]:
    found = [Launch(d, e, w) for d in options.dtype for e in options.engines for w in options.processes]
    return [launch for launch in found if launch.dtype == "fp32" or launch.engine == "ddp"]


def _cases(options: argparse.Namespace) -> list[Case]:
    """Returns every training of one launch."""
    found = [(task, layout, k) for task in options.tasks for layout in options.layouts for k in options.accumulation]
    some = [layout for layout in options.layouts if layout in COUPLED_LAYOUTS] or options.layouts
    return [case for case in found if case[0] not in COUPLED or case[1] in some]


# Comparing


def _reference(task: str, launch: Launch, k: int) -> Reference:
    """Returns the literal training that a case is compared with."""
    if task not in COUPLED:
        return _train_once(task, 1, 1, "fp32", "cpu")
    return _train_once(task, launch.processes, k, launch.dtype, launch.device)


@functools.cache
def _train_once(task: str, processes: int, k: int, dtype: str, device: str) -> Reference:
    return train_literally(RECIPES[task], processes=processes, k=k, dtype=DTYPES[dtype], device=device)


def _compare(launch: Launch, result: dict[str, Any], reference: Reference) -> Row:
    """Returns the largest differences of one case."""
    pairs = zip(result["losses"], reference.losses, strict=True)
    loss = max((abs(ours - theirs) / abs(theirs) for ours, theirs in pairs), key=_nan_last)
    if result["final"].keys() != reference.updates.keys():
        raise RuntimeError(f"the engine's tensors {sorted(result['final'])} are not {sorted(reference.updates)}")
    differences = {}
    for name, wanted in reference.updates.items():
        update = result["final"][name] - reference.initial[name]
        differences[name] = float((update - wanted).norm() / wanted.norm())
    worst = max(differences, key=lambda name: _nan_last(differences[name]))
    where = (worst, result["layout"], result["k"], result["kept"])
    return Row(launch.dtype, launch.engine, launch.processes, result["task"], loss, differences[worst], *where)


def _nan_last(value: float) -> tuple[bool, float]:
    return value != value, value


def _print_movement(launches: Sequence[Launch], cases: Sequence[Case]) -> dict[str, dict[str, float]]:
    """Prints and returns how far each tensor moves, relative to itself, in the reference where it moves least."""
    moves: dict[str, dict[str, float]] = {}
    for launch, (task, _, k) in itertools.product(launches, cases):
        moved = moves.setdefault(task, {})
        for name, value in _reference(task, launch, k).moved().items():
            moved[name] = min(value, moved.get(name, value))
    for task, moved in moves.items():
        least, most = min(moved, key=moved.__getitem__), max(moved, key=moved.__getitem__)
        spread = f"{moved[least]:.1%} ({least}) to {moved[most]:.1%} ({most})"
        verdict = "ok" if moved[least] >= MIN_MOVEMENT else "TOO LITTLE"
        print(f"{task}: weights move by {spread}; at least {MIN_MOVEMENT:.0%} is needed: {verdict}", flush=True)
    return moves


def _print_table(rows: Sequence[Row]) -> None:
    """Prints, for each launch and task, the largest difference over its cases."""
    groups: dict[tuple[str, str, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.dtype, row.engine, row.processes, row.task), []).append(row)
    form = "{:5} {:6} {:>9}  {:11} {:>8} {:>8}  {:<36} {}"
    print("\nLargest relative difference from one process in float64")
    print(form.format("dtype", "engine", "processes", "task", "loss", "update", "largest update difference in", ""))
    for group in groups.values():
        worst = max(group, key=lambda row: _nan_last(row.update))
        worst = replace(worst, loss=max((row.loss for row in group), key=_nan_last))
        where = f"{worst.tensor} ({worst.layout}, k={worst.k})"
        figures = (f"{worst.loss:.1e}", f"{worst.update:.1e}", where, "ok" if worst.passes else "ABOVE TOLERANCE")
        print(form.format(worst.dtype, worst.engine, worst.processes, worst.task, *figures))
    print("Tolerance: " + ", ".join(f"{limit:.0e} in {dtype}" for dtype, limit in TOLERANCES.items()))
    for engine in SHARDED_GRADIENTS:
        kept = [row.kept for row in rows if row.engine == engine and row.k > 1]
        if kept:
            print(f"{engine}: gradient elements in full size between micro-batches: {max(kept)}")


if __name__ == "__main__":
    sys.exit(main())
