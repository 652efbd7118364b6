"""Draws the README's picture of the quickstart from its run folders, one per seed.

    for seed in 0 1 2; do
        accelerate launch --config_file accelerate_configs/cpu.yaml -m scale_guide train --config quickstart \
            --training.seed $seed --run_dir runs/quickstart_$seed
    done
    python scripts/draw_quickstart.py runs/quickstart_0 runs/quickstart_1 runs/quickstart_2
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean, stdev

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from scale_guide.tracking import read_metrics, read_summary

COLOURS = {"unguided": "tab:gray", "guided": "tab:blue"}
OUT = Path(__file__).parent / "figures" / "quickstart.png"


def draw_validation(axes: Axes, runs: list[Path]) -> None:
    """Validation accuracy over epochs, a thin line a seed and the mean in bold."""
    for variant, colour in COLOURS.items():
        curves = []
        for run in runs:
            lines = read_metrics(run / variant)
            per_epoch = next(line["step"] / line["epoch"] for line in lines if "epoch" in line)
            scored = [line for line in lines if "validation" in line]
            points = [(line["step"] / per_epoch, line["validation"]["accuracy"]) for line in scored]
            curves.append(points)
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=0.6)
        mean = [(points[0][0], fmean(accuracy for _, accuracy in points)) for points in zip(*curves, strict=True)]
        axes.plot(*zip(*mean, strict=True), color=colour, linewidth=2.2, label=variant)
    axes.set(title="validation accuracy", xlabel="epoch", ylim=(0, 1))
    axes.legend(loc="upper left")


def draw_similarity(axes: Axes, run: Path) -> None:
    """Every pair of the guided run of one seed: CKA at the end, its debiased value and its null floor."""
    last = [line for line in read_metrics(run / "guided") if "pairs" in line][-1]["pairs"]
    for figure, style in (("similarity", "o-"), ("debiased", "s:"), ("floor", "--")):
        axes.plot([pair[figure] for pair in last.values()], style, label=figure, markersize=3, linewidth=1.2)
    axes.set(title="CKA of the layer pairs after training", xlabel="pair, first to last layer", ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.35))


def main() -> None:
    """Draws, saves, and prints mean and standard error over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of the quickstart, at least two seeds")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2))
    draw_validation(left, options.runs)
    draw_similarity(right, options.runs[0])
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=100)
    for variant in COLOURS:
        summaries = [read_summary(run / variant) for run in options.runs]
        found = [summary["validation"]["accuracy"] for summary in summaries if summary is not None]
        error = stdev(found) / len(found) ** 0.5 if len(found) > 1 else float("nan")
        print(f"{variant:9} validation accuracy {fmean(found):.3f} +- {error:.3f} over {len(found)} seeds")


if __name__ == "__main__":
    main()
