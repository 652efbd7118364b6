"""Many seeds of a recipe, one after another, and their report.

    python scripts/run_seeds.py quickstart --seeds 5 --variants unguided,guided --optimizer.lr 0.002

Seed s trains every variant into RUNS/seed_s, from the same weights and in the same data order: all of these follow
training.seed. What is not an option of this script goes to `scale-guide train` as it is. A seed that was cut off goes
on, and a finished one is left alone, when the same command is given again. A seed that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from scale_guide import lookup

STOPS = (signal.SIGTERM, signal.SIGINT)


class Child:
    """Runs one command at a time and passes SIGTERM and Ctrl-C on to it."""

    def __init__(self) -> None:
        """Takes both signals over until `close`."""
        self.stopped_by = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._before = {number: signal.signal(number, self._pass_on) for number in STOPS}

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = number
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def run(self, command: Sequence[str]) -> int:
        """Returns the exit code of a command (a signal's is negative), once all that it started is gone."""
        readers, writer = os.pipe()
        # A session of its own, or a Ctrl-C would reach it from the terminal as well.
        self._process = subprocess.Popen(command, stdin=readers, start_new_session=True)
        os.close(readers)
        if self.stopped_by:
            self._pass_on(self.stopped_by, None)
        code = self._process.wait()
        # A launcher that dies of the signal leaves its training behind, saving: its stdin is open until it ends.
        ended = select.poll()
        ended.register(writer, 0)
        ended.poll()
        os.close(writer)
        self._process = None
        return code

    def close(self) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Returns the options of this script, and what is meant for `scale-guide train`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", help="Name of a shipped recipe, or a YAML file.")
    parser.add_argument("--seeds", type=int, default=5, help="How many (default 5).")
    parser.add_argument("--first_seed", type=int, default=0, help="The first of them (default 0).")
    parser.add_argument("--variants", default="", help="Names of variants, commas between (default: all).")
    parser.add_argument(
        "--config_file", default="accelerate_configs/cpu.yaml", help="Launch file (default: two CPU processes)."
    )
    parser.add_argument("--num_processes", type=int, help="Number of processes (default: the launch file's).")
    parser.add_argument("--runs", help="Folder of the seeds' folders and of the report (default runs/RECIPE).")
    options, overrides = parser.parse_known_args(arguments)
    for name in ("--run_dir", "--training.seed", "--only"):
        if any(word.split("=")[0] == name for word in overrides):
            parser.error(f"{name} is this script's to set: use --runs, --seeds and --first_seed, or --variants")
    if options.seeds < 1:
        parser.error(f"--seeds={options.seeds} must be at least 1")
    try:
        name = lookup.recipe_name(lookup.recipe_path(options.recipe))
    except ValueError as error:
        parser.error(str(error))
    options.runs = Path(options.runs or Path("runs") / name)
    return options, overrides


def train_command(options: argparse.Namespace, overrides: Sequence[str], seed: int) -> list[str]:
    """Returns the command that trains one seed."""
    processes = [] if options.num_processes is None else ["--num_processes", str(options.num_processes)]
    launch = ["accelerate.commands.launch", "--config_file", options.config_file, *processes]
    only = ["--only", options.variants] if options.variants else []
    own = ["--training.seed", str(seed), "--run_dir", str(options.runs / f"seed_{seed}"), *only]
    train = ["scale_guide", "train", "--config", options.recipe, *overrides, *own]
    return [sys.executable, "-m", *launch, "-m", *train]


def run_all(commands: dict[int, list[str]]) -> tuple[dict[int, int], int]:
    """Returns the exit code of every seed that failed, and the signal that ended them all early (0: none)."""
    child, failed = Child(), {}
    for seed, command in commands.items():
        print(f"seed {seed}", flush=True)
        code = child.run(command)
        if child.stopped_by:
            break
        if code:
            failed[seed] = code
            print(f"seed {seed} failed with exit code {code}; going on", flush=True)
    child.close()
    return failed, child.stopped_by


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains and reports; returns 0, 1 if a seed failed, or 128 + the signal that stopped it."""
    options, overrides = parse(arguments)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    failed, signal_number = run_all({seed: train_command(options, overrides, seed) for seed in seeds})
    if signal_number:
        print("stopped: the same command goes on from here", flush=True)
        return 128 + signal_number
    folders = [options.runs / f"seed_{seed}" for seed in seeds]
    trained = [str(folder) for folder in folders if any(folder.rglob("config.yaml"))]
    code = 0
    if trained:
        report = [sys.executable, "-m", "scale_guide", "report", *trained, "--out", str(options.runs)]
        code = subprocess.run(report, check=False).returncode
    for seed, exit_code in failed.items():
        print(f"failed: seed {seed} (exit code {exit_code})", file=sys.stderr, flush=True)
    return 1 if failed or code else 0


if __name__ == "__main__":
    sys.exit(main())
