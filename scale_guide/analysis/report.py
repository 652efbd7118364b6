"""Runs -> a Markdown table and a picture of their curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scale_guide.disk import write_atomically
from scale_guide.lookup import closest
from scale_guide.tracking import read_metrics, read_summary


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in [head, *rows]]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def find_runs(paths: Sequence[Path]) -> dict[str, Path]:
    """Returns run folders by a short name; a folder that holds variants counts as all of them.

    Raises:
        ValueError: a folder without any run.
    """
    found: dict[str, Path] = {}
    for path in paths:
        inside = [path] if (path / "config.yaml").exists() else sorted(p.parent for p in path.glob("*/config.yaml"))
        if not inside:
            beside = [str(p.parent) for p in path.parent.glob("*/config.yaml")] if path.parent.exists() else []
            raise ValueError(f"RUN={str(path)!r} holds no run (no config.yaml){closest(str(path), beside)}.")
        several = len(paths) > 1
        found |= {str(run) if several else run.name: run for run in inside}
    return found


def table(runs: Mapping[str, Path]) -> str:
    """Returns one line per run: its validation scores, last losses and time."""
    summaries = {name: read_summary(path) or {} for name, path in runs.items()}
    metrics = {name: read_metrics(path) for name, path in runs.items()}
    scores = list(dict.fromkeys(s for summary in summaries.values() for s in summary.get("validation", {})))
    rows = []
    for name, summary in summaries.items():
        steps = [line for line in metrics[name] if "task_loss" in line]
        last: dict[str, Any] = steps[-1] if steps else {}
        rows.append(
            [
                name,
                str(last.get("step", 0)) + ("" if summary else " (unfinished)"),
                *(_number(summary.get("validation", {}).get(score)) for score in scores),
                _number(last.get("task_loss")),
                _number(last.get("similarity")),
                f"{summary.get('seconds', last.get('seconds', 0.0)):.0f}",
            ]
        )
    head = ["run", "steps", *(f"validation {score}" for score in scores), "training loss", "similarity", "seconds"]
    return markdown(head, rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def curves(runs: Mapping[str, Path], path: Path) -> None:
    """Saves a picture: training loss, mean similarity and each validation score over steps, one line per run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = {name: read_metrics(run) for name, run in runs.items()}
    lines = [line for run in metrics.values() for line in run]
    names = list(dict.fromkeys(n for line in lines for n in line.get("validation", {})))
    panels = ["task_loss", *(["similarity"] if any("similarity" in line for line in lines) else []), *names]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.6), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for name, run in metrics.items():
            points = [(line["step"], line.get("validation", line).get(panel)) for line in run]
            points = [(x, y) for x, y in points if y is not None]
            axis.plot(
                *zip(*points, strict=True) if points else ([], []), label=name, marker="." if panel in names else ""
            )
        axis.set(xlabel="step", title=f"validation {panel}" if panel in names else panel.replace("_", " "))
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write(runs: Mapping[str, Path], out: Path) -> str:
    """Writes report.md and curves.png into `out`; returns the table and where they are."""
    text = table(runs)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "report.md", text + "\n\n![curves](curves.png)\n")
    curves(runs, out / "curves.png")
    return f"{text}\n\ncurves: {out / 'curves.png'}"
