"""Heat maps: what stands where, with how many names."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from scale_guide.analysis.heatmap import LONGEST_NAME, MAX_NAMES, heatmap


@pytest.mark.parametrize("num_rows", [1, 3, 24, 25, 49, 500])
def test_few_names_and_each_at_its_row(num_rows: int) -> None:
    axis = Figure().subplots()
    names = [f"hidden.{i}.linear" for i in range(num_rows)]
    heatmap(axis, np.zeros((num_rows, 2)), names, ["a", "b"])
    shown = [
        (int(tick), label.get_text()) for tick, label in zip(axis.get_yticks(), axis.get_yticklabels(), strict=True)
    ]
    assert 0 < len(shown) <= MAX_NAMES
    assert all(name == names[place] for place, name in shown)
    assert len(shown) > min(num_rows, MAX_NAMES) // 2


def test_numbers_in_small_maps_only() -> None:
    figure = Figure()
    small, large = figure.subplots(1, 2)
    image = heatmap(small, [[0.25, float("nan")]], ["r"], ["a", "b"], low=-1.0)
    assert [text.get_text() for text in small.texts] == ["0.25", "nan"]
    assert image.get_clim() == (-1.0, 1.0)
    heatmap(large, np.eye(11), [str(i) for i in range(11)], [str(i) for i in range(11)])
    assert not large.texts


def test_long_names_keep_their_end() -> None:
    axis = Figure().subplots()
    name = "encoder.stages.3.layers.17.mlp.experts.12.down_proj"
    heatmap(axis, [[1.0]], [name], ["x"])
    (label,) = axis.get_yticklabels()
    assert len(label.get_text()) <= LONGEST_NAME
    assert label.get_text().endswith("experts.12.down_proj")
