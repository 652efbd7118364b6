"""The picture of a comparison: a map of layers for each pair of networks, and each layer's intrinsic dimension."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from scale_guide.analysis.cka_map import Comparison
from scale_guide.analysis.heatmap import heatmap


def draw(comparison: Comparison, maps: Mapping[str, tuple[str, str]]) -> Figure:
    """Returns the picture.

    Args:
        comparison: The figures.
        maps: Title -> the networks of a map, the first along its rows.
    """
    figure = Figure(figsize=(5.4 * len(maps) + 4.2, 5.6), layout="constrained")
    axes = figure.subplots(1, len(maps) + 1, width_ratios=[5.4] * len(maps) + [4.2])
    for axis, (title, (first, second)) in zip(axes, maps.items(), strict=False):
        rows, columns = comparison.layers[first], comparison.layers[second]
        image = heatmap(axis, comparison.between(first, second), rows, columns)
        axis.set(title=title, ylabel=first, xlabel=second)
    figure.colorbar(image, ax=list(axes[:-1]), label=f"debiased CKA, {comparison.num_rows:,} samples", shrink=0.8)
    for name, values in comparison.dimensions.items():
        depths = [i / max(len(values) - 1, 1) for i in range(len(values))]
        axes[-1].plot(depths, values, marker=".", label=name)
    axes[-1].set(
        title="intrinsic dimension",
        xlabel="depth, first to last layer",
        ylabel=f"TwoNN, {comparison.num_points:,} samples",
        ylim=(0, None),
    )
    axes[-1].grid(alpha=0.3)
    axes[-1].legend(fontsize=8)
    return figure
