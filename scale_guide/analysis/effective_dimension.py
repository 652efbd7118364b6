"""How many dimensions a layer really fills, and how many rows a pair of layers needs to tell likeness from chance.

The effective dimension of rows with covariance S is d = (tr S)^2 / tr(S^2): 1 for rows on a line, p for white rows of
p columns. Unrelated rows of a pair have a CKA of about sqrt(d_x d_y) / (N - 1), its floor (DESIGN 1).
"""

from __future__ import annotations

import math

from scale_guide.statistics import Matrices, Node

FLOOR = 0.1
"""A pair has rows enough when unrelated rows would give it less than this."""


def effective_dimension(matrices: Matrices, node: Node) -> float:
    """Returns the effective dimension (tr S)^2 / tr(S^2) of a layer's rows; 0 without spread, inf if N cannot tell.

    The sample's own (tr K)^2 / |K|^2 is never above N - 1, and far too low where d is near N or beyond. tr(S^2) is
    therefore estimated without bias: HSIC of the layer with itself by the estimator of Song et al. 2012 (see
    similarity/debiased_cka.py). Its error is a share of about 2 / N + sqrt(8 / (N d)) of tr(S^2) for Gaussian rows,
    whatever d; with few rows it can fall to 0 or below, and then d is inf.

    Args:
        matrices: Of centred rows; with the sums of squared norms, where they are in feature form.
        node: The layer.
    """
    n = matrices.num_rows
    if node in matrices.grams:
        gram = matrices.grams[node].double()
        trace, inner, square = gram.diagonal().sum(), gram.square().sum(), gram.diagonal().square().sum()
    else:
        outer = matrices.features[node].double()
        trace, inner, square = outer.diagonal().sum(), outer.square().sum(), matrices.squares[node].double()
    if trace == 0:
        return 0.0
    unbiased = inner - n / (n - 2) * square + trace.square() / ((n - 1) * (n - 2))
    if unbiased <= 0:
        return math.inf
    return float((trace / (n - 1)).square() / (unbiased / (n * (n - 3))))


def rows_needed(target: float, guide: float) -> int:
    """Returns N >= 1 + sqrt(d_x d_y) / FLOOR, at which the floor of layers of these effective dimensions is below it.

    With a tenth to spare: at that N the sample's own dimensions, of which the floor is made, are still a tenth lower.
    """
    return math.ceil(1 + math.sqrt(target * guide) / FLOOR)
