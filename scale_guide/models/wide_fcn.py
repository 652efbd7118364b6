"""Wide FCN: few and very wide fully connected layers (PAPER.md section 2)."""

from __future__ import annotations

from math import prod

from scale_guide.models._fcn import FCN


def build(
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    depth: int = 3,
    width: int = 8192,
    dropout: float = 0.0,
    batch_norm: bool = True,
) -> FCN:
    """Wide FCN of `depth` hidden layers, `width` wide; by default the paper's: 1.376 billion weights at 3x224x224.

    Raises:
        ValueError: depth below 1.
    """
    if depth < 1:
        raise ValueError(f"depth of wide_fcn is {depth}: it must be at least 1; the paper takes 3")
    return FCN([prod(input_shape), *[width] * depth], num_classes, dropout=dropout, batch_norm=batch_norm)
