"""Deep FCN: the fully connected network that hardly trains alone (PAPER.md section 2)."""

from __future__ import annotations

from math import prod

from scale_guide.models._fcn import FCN


def build(
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    depth: int = 48,
    first_width: int = 2048,
    width: int = 1024,
    dropout: float = 0.1,
    batch_norm: bool = True,
) -> FCN:
    """Deep FCN of `depth` hidden layers, `first_width` and then `width` wide; by default the paper's, at 3x224x224.

    Raises:
        ValueError: depth below 1.
    """
    if depth < 1:
        raise ValueError(f"depth of deep_fcn is {depth}: it must be at least 1; the paper takes 48")
    widths = [prod(input_shape), first_width, *[width] * (depth - 1)]
    return FCN(widths, num_classes, dropout=dropout, batch_norm=batch_norm)
