"""scale-guide report RUN...: a table and curves over runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from scale_guide.analysis import report
from scale_guide.commands import user_errors


def main(arguments: Sequence[str]) -> int:
    """Prints the table and saves the curves; returns 0."""
    parser = ArgumentParser(prog="scale-guide report")
    parser.add_argument(
        "runs", nargs="+", type=str, help="Run folders; one that holds variants counts as all of them."
    )
    parser.add_argument(
        "--out", type=str, default="", help="Folder of report.md and curves.png; empty: the first run's."
    )
    given = parser.parse_args(list(arguments))
    with user_errors():
        runs = report.find_runs([Path(run) for run in given.runs])
        print(report.write(runs, Path(given.out or given.runs[0])))
    return 0
