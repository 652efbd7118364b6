"""Do W processes x k micro-batches train as one process does? Every engine against a literal float64 training.

    python scripts/check_parity.py                          # 1, 2, 4 processes x DDP, ZeRO 0-3 (and DDP in float64)
    python scripts/check_parity.py --accumulation 1,3,8     # more micro-batches
    python scripts/check_parity.py --break world            # plants a bug; exits with 1, as it must

Two recipes (parity_cases.py), SGD, no dropout, no BatchNorm, a global batch of 96 rows, 5 steps. For each it compares
the loss of each step, |loss - reference| / |reference|, and the *update* of each parameter tensor,
|update - reference| / |reference| with update = weights after 5 steps - weights before: a parameter itself would hide
an error behind a small learning rate. The reference is plain PyTorch in one process and float64, the whole batch in
one graph. The measured side is the product: its engine, guided_step, guidance and tasks, under `accelerate launch`.
Under ZeRO-2 and -3 no gradient may stay in full size between two micro-batches of a step.

Exit code: 0 equal; 1 not equal: a difference above the tolerance (fp32: 1e-4, fp64: 1e-9), a gradient that stayed, or
weights that move by less than 1 %, which would prove nothing; 2 it could not run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from parity_cases import BATCH_SIZE, RECIPES, Reference, train_literally
from parity_worker import BUGS

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3")
LAYOUTS = ("auto", "gather", "transpose", "covariance")
TOLERANCES = {"fp32": 1e-4, "fp64": 1e-9}
MIN_MOVEMENT = 0.01
SHARDED_GRADIENTS = ("zero2", "zero3")


@dataclass(frozen=True)
class Launch:
    """One `accelerate launch`, in which all cases (task, layout, k) run one after another."""

    dtype: str
    engine: str
    processes: int

    @property
    def name(self) -> str:
        """What `Engine.name` says under this launch."""
        return "DDP" if self.engine == "ddp" else f"ZeRO-{self.engine[-1]}"

    @property
    def device(self) -> str:
        """cuda where there is a GPU for each process, else cpu."""
        return "cuda" if torch.cuda.device_count() >= self.processes else "cpu"

    def __str__(self) -> str:
        return f"{self.dtype} {self.engine} x {self.processes} on {self.device}"


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
    cases = [(task, layout, k) for task in options.tasks for layout in options.layouts for k in options.accumulation]
    start = time.perf_counter()
    print(
        f"{len(launches)} launches of {len(cases)} cases; the reference trains in one process and float64", flush=True
    )
    references = {task: train_literally(RECIPES[task]) for task in options.tasks}
    moves = _print_movement(references)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="check_parity_") as folder:
        for number, launch in enumerate(launches, 1):
            label, began = f"[{number}/{len(launches)}] {launch}", time.perf_counter()
            results = _run(launch, cases, options.bug, Path(folder), label)
            found = [_compare(launch, result, references[result["task"]]) for result in results]
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
        "plant this bug: W missing in the gradient that goes home, rows centred per rank, or task loss / local count"
    )
    parser.add_argument("--break", choices=BUGS, dest="bug", help=bugs)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    options.processes = options.processes or ([2] if options.bug else [1, 2, 4])
    options.engines = options.engines or (["ddp"] if options.bug else ENGINES)
    options.dtype = options.dtype or (["fp32"] if options.bug else list(TOLERANCES))
    if options.bug and min(options.processes) < 2:
        parser.error("--break needs --processes of 2 or more: one process has no other to disagree with.")
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


# Launching


def _run(
    launch: Launch, cases: Sequence[tuple[str, str, int]], bug: str | None, folder: Path, label: str
) -> list[dict[str, Any]]:
    """Returns what the worker found; exits with 2 if it failed. On a terminal it shows which case is running."""
    path = folder / f"{launch.dtype}_{launch.engine}_{launch.processes}.json"
    job = {"engine": launch.name, "processes": launch.processes, "device": launch.device, "dtype": launch.dtype}
    path.write_text(json.dumps({**job, "bug": bug, "cases": cases}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(_launch_file(launch, folder))]
    command += [str(ROOT / "scripts" / "parity_worker.py"), str(path)]
    # One thread each: the networks are tiny, and the processes share the cores.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if launch.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    tail: list[str] = []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                tail = [*tail[-60:], line]
                if line.startswith("parity: ") and sys.stdout.isatty():
                    print(f"\r{label}: {line[len('parity: ') :].strip():<30}\r", end="", flush=True)
        except BaseException:
            process.terminate()
            raise
    if process.returncode or not path.with_suffix(".pt").exists():
        print("".join(tail), file=sys.stderr)
        print(f"check_parity: the launch {launch} failed with exit code {process.returncode}.", file=sys.stderr)
        raise SystemExit(2)
    results: list[dict[str, Any]] = torch.load(path.with_suffix(".pt"), weights_only=True)
    return results


def _launch_file(launch: Launch, folder: Path) -> Path:
    """Returns a launch file like the repository's, for this number of processes."""
    if launch.engine == "ddp":
        shipped = "cpu" if launch.device == "cpu" else "ddp"
    else:
        shipped = launch.engine.replace("zero0", "zero1")  # no launch file is shipped for stage 0, only its JSON
    config = yaml.safe_load((ROOT / "accelerate_configs" / f"{shipped}.yaml").read_text())
    config["num_processes"] = launch.processes
    if launch.engine != "ddp":
        deepspeed = json.loads((ROOT / "ds_configs" / f"{launch.engine}.json").read_text())
        if launch.engine == "zero3":
            # As shipped, tensors as small as these would stay whole on every rank.
            deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        path = folder / f"{launch.engine}.json"
        path.write_text(json.dumps(deepspeed))
        config["deepspeed_config"]["deepspeed_config_file"] = str(path)
    path = folder / f"{launch.engine}_{launch.processes}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


# Comparing


def _compare(launch: Launch, result: dict[str, Any], reference: Reference) -> Row:
    """Returns the largest differences of one case."""
    pairs = zip(result["losses"], reference.losses, strict=True)
    loss = max((abs(ours - theirs) / abs(theirs) for ours, theirs in pairs), key=_nan_last)
    if result["final"].keys() != reference.updates.keys():
        raise RuntimeError(f"the engine's parameters {sorted(result['final'])} are not {sorted(reference.updates)}")
    differences = {}
    for name, wanted in reference.updates.items():
        update = result["final"][name] - reference.initial[name]
        differences[name] = float((update - wanted).norm() / wanted.norm())
    worst = max(differences, key=lambda name: _nan_last(differences[name]))
    where = (worst, result["layout"], result["k"], result["kept"])
    return Row(launch.dtype, launch.engine, launch.processes, result["task"], loss, differences[worst], *where)


def _nan_last(value: float) -> tuple[bool, float]:
    return value != value, value


def _print_movement(references: dict[str, Reference]) -> dict[str, dict[str, float]]:
    """Prints and returns how far each parameter moves, relative to itself."""
    moves = {task: reference.moved() for task, reference in references.items()}
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
