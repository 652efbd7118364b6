"""Draws and tabulates what a larger effective batch buys, from run folders of the recipe effective_batch, one a seed.

    for seed in 0 1 2; do
        accelerate launch --config_file accelerate_configs/cpu.yaml --num_processes 1 -m scale_guide train \
            --config effective_batch --training.seed $seed --run_dir runs/effective_batch_$seed
    done
    python scripts/draw_effective_batch.py runs/effective_batch_0 runs/effective_batch_1 runs/effective_batch_2

Left: validation accuracy after the last step, mean and standard error over the seeds. Right: for the guided runs, the
training similarity that was logged last beside its null floor, mean over pairs and seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from scale_guide.analysis.table import markdown
from scale_guide.tracking import read_metrics, read_summary

SIZES = (64, 256, 1024)
WAYS = {"unguided": "tab:gray", "micro_batch": "tab:orange", "exact": "tab:blue", "debiased": "tab:green"}
LABELS = {
    "unguided": "no guide",
    "micro_batch": "CKA of each micro-batch",
    "exact": "CKA of the whole batch",
    "debiased": "debiased CKA of the whole batch",
}
OUT = Path(__file__).parent / "figures" / "effective_batch.png"


def scores(runs: Sequence[Path], size: int, way: str, name: str) -> list[float]:
    """The validation score `name` of each seed that has finished."""
    summaries = [read_summary(run / f"{size}_{way}") for run in runs]
    return [float(summary["validation"][name]) for summary in summaries if summary is not None]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error; NaN where there are too few."""
    if not values:
        return float("nan"), float("nan")
    return fmean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def pair_figure(runs: Sequence[Path], size: int, way: str, figure: str) -> float:
    """The mean over pairs and seeds of what was logged last: similarity, debiased or floor."""
    found = []
    for run in runs:
        lines = [line for line in read_metrics(run / f"{size}_{way}") if "pairs" in line]
        found += [pair[figure] for pair in lines[-1]["pairs"].values()] if lines else []
    return fmean(found) if found else float("nan")


def draw_scores(axes: Axes, runs: Sequence[Path]) -> None:
    """Validation accuracy over the effective batch, a line a way."""
    for way, colour in WAYS.items():
        points = [mean_and_error(scores(runs, size, way, "accuracy")) for size in SIZES]
        means, errors = zip(*points, strict=True)
        axes.errorbar(SIZES, means, yerr=errors, color=colour, marker="o", capsize=3, label=LABELS[way])
    axes.set(title="validation accuracy after 200 steps", ylim=(0, 1.5 * axes.get_ylim()[1]))
    axes.legend(fontsize=8, loc="upper left")


def draw_floors(axes: Axes, runs: Sequence[Path]) -> None:
    """The logged similarity and its null floor over the effective batch."""
    for way in ("micro_batch", "exact"):
        for figure, style in (("similarity", "o-"), ("floor", "x--")):
            values = [pair_figure(runs, size, way, figure) for size in SIZES]
            axes.plot(SIZES, values, style, color=WAYS[way], label=f"{figure}, {LABELS[way]}")
    axes.set(title="training CKA and that of unrelated rows", ylim=(0, 1))
    axes.legend(fontsize=8)


def table(runs: Sequence[Path]) -> str:
    """Accuracy and loss of every size and way, and the CKA and floor logged last."""
    rows: list[list[str]] = []
    for size in SIZES:
        for way, label in LABELS.items():
            accuracy, loss = (scores(runs, size, way, name) for name in ("accuracy", "loss"))
            cells = [f"{mean:.3f} +- {error:.3f}" for mean, error in map(mean_and_error, (accuracy, loss))]
            logged: list[Any] = ["-", "-"]
            if way != "unguided":
                logged = [f"{pair_figure(runs, size, way, figure):.3f}" for figure in ("debiased", "floor")]
            rows.append([str(size), label, *cells, *logged, str(len(accuracy))])
    head = ["effective batch", "guidance", "validation accuracy", "validation loss", "debiased CKA", "floor", "seeds"]
    return markdown(head, rows)


def main() -> None:
    """Draws, saves, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of effective_batch, at least two seeds")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4))
    draw_scores(left, options.runs)
    draw_floors(right, options.runs)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(SIZES, [f"{size:,}" for size in SIZES])
        axes.set_xlabel("effective batch (rows of a step)")
        axes.grid(alpha=0.3)
    figure.tight_layout()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=100)
    print(table(options.runs))


if __name__ == "__main__":
    main()
