"""A matrix as a picture, with names along its sides."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from numpy.typing import ArrayLike

MAX_NAMES = 24
"""Names along a side; of more, some are left out."""
MAX_NUMBERS = 10
"""Rows or columns up to which each cell shows its number."""
LONGEST_NAME = 32


def heatmap(
    axis: Axes,
    values: ArrayLike,
    row_names: Sequence[str],
    column_names: Sequence[str],
    *,
    low: float = 0.0,
    high: float = 1.0,
) -> AxesImage:
    """Returns the image of values [rows, columns] on `axis`, the first row on top; NaN is grey.

    Args:
        axis: Where to draw.
        values: Any array-like.
        row_names: One for each row.
        column_names: One for each column.
        low: The value of the darkest colour.
        high: The value of the lightest colour.
    """
    table = np.asarray(values, dtype=float)
    colours = matplotlib.colormaps["magma"].with_extremes(bad="0.8")
    image = axis.imshow(table, vmin=low, vmax=high, cmap=colours, aspect="auto", interpolation="nearest")
    axis.set_xticks(*_shown(column_names), rotation=90 if max(map(len, column_names)) > 3 else 0, fontsize=8)
    axis.set_yticks(*_shown(row_names), fontsize=8)
    if max(table.shape) <= MAX_NUMBERS:
        for (row, column), value in np.ndenumerate(table):
            colour = "white" if value < (low + high) / 2 else "black"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    return image


def _shown(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Returns the places that get a name, evenly spread, and their names, whose ends tell them apart."""
    places = list(range(0, len(names), math.ceil(len(names) / MAX_NAMES)))
    return places, [_shortened(names[i]) for i in places]


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else "..." + name[3 - LONGEST_NAME :].lstrip(".")
