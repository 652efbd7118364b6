"""scale-guide report RUN...: tables, pictures and a page over runs and their seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from scale_guide.analysis import report
from scale_guide.commands import user_errors


def main(arguments: Sequence[str]) -> int:
    """Prints the tables and saves the report; returns 0."""
    parser = ArgumentParser(prog="scale-guide report")
    parser.add_argument(
        "runs", nargs="+", type=str, help="Run folders, or folders that hold some: variants, seeds, recipes."
    )
    parser.add_argument(
        "--out",
        type=str,
        default="",
        help="Folder of report.html, report.md and figures/; empty: the first RUN.",
    )
    given = parser.parse_args(list(arguments))
    with user_errors():
        print(report.write([Path(run) for run in given.runs], Path(given.out or given.runs[0])))
    return 0
