"""Do two networks fail on the same examples? Error consistency of Geirhos et al. 2020, "Beyond accuracy"."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def error_consistency(correct_a: Any, correct_b: Any) -> float:
    """Cohen's kappa of two correctness vectors, from -1 to 1; 0 is what two independent networks would reach.

    kappa = (observed - expected) / (1 - expected), where `observed` is the share of examples on which both are right
    or both are wrong, and `expected` = a * b + (1 - a) * (1 - b) the share that their accuracies a and b alone would
    give (Geirhos et al. 2020, eq. 1 to 3). Two networks that never differ get 1, also where kappa is 0 / 0 because
    both are right (or both wrong) everywhere.

    Args:
        correct_a: [N] booleans (or 0 and 1), any array-like or tensor: was example n answered correctly?
        correct_b: [N] the same for the other network, over the same examples in the same order.

    Raises:
        ValueError: a vector is empty or not one-dimensional, holds something else than 0 and 1, or the lengths differ.
    """
    return float(_kappa(_counts(correct_a, correct_b)))


def error_consistency_interval(
    correct_a: Any, correct_b: Any, *, level: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Returns the bootstrap confidence interval of the error consistency, over examples drawn with replacement.

    The percentile interval (Efron 1979). Kappa needs only how many examples both, one, the other or none answered
    correctly, so each resample is one multinomial draw of these four counts.

    Args:
        correct_a: [N] as for `error_consistency`.
        correct_b: [N] the same for the other network.
        level: Share of resamples inside the interval.
        num_resamples: Resamples drawn.
        seed: Of the draws.

    Raises:
        ValueError: vectors that do not fit, a level outside 0..1, or no resamples.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1: give 0.95 for a 95 % interval.")
    if num_resamples < 1:
        raise ValueError(f"num_resamples={num_resamples} must be at least 1: give 10,000.")
    counts = _counts(correct_a, correct_b)
    num_examples = int(counts.sum())
    draws = np.random.default_rng(seed).multinomial(num_examples, counts / num_examples, size=num_resamples)
    low, high = np.quantile(_kappa(draws), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def error_consistency_bounds(accuracy_a: float, accuracy_b: float) -> tuple[float, float]:
    """Returns the least and the largest error consistency that two accuracies allow (Geirhos et al. 2020, appendix).

    Networks of accuracies a and b agree on at least |a + b - 1| and at most 1 - |a - b| of the examples.

    Args:
        accuracy_a: From 0 to 1.
        accuracy_b: From 0 to 1.

    Raises:
        ValueError: an accuracy outside 0..1.
    """
    for name, value in (("accuracy_a", accuracy_a), ("accuracy_b", accuracy_b)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must be a share from 0 to 1: divide a percentage by 100.")
    expected = accuracy_a * accuracy_b + (1 - accuracy_a) * (1 - accuracy_b)
    if expected == 1:
        return 1.0, 1.0
    least, most = abs(accuracy_a + accuracy_b - 1), 1 - abs(accuracy_a - accuracy_b)
    return (least - expected) / (1 - expected), (most - expected) / (1 - expected)


def _kappa(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Kappa [...] of counts [..., 4] of examples that both, a alone, b alone and none answered correctly."""
    both, only_a, only_b, neither = np.moveaxis(counts, -1, 0)
    total, equal = counts.sum(axis=-1), both + neither
    a, b = both + only_a, both + only_b
    # Whole numbers up to the division: no rounding, and where the two differ `expected` is below total^2.
    expected = a * b + (total - a) * (total - b)
    rest = np.where(equal == total, 1, total**2 - expected)
    return np.where(equal == total, 1.0, (equal * total - expected) / rest)


def _counts(correct_a: Any, correct_b: Any) -> NDArray[np.int64]:
    """Of the checked vectors: examples that both, a alone, b alone and none answered correctly [4]."""
    a, b = _correctness("correct_a", correct_a), _correctness("correct_b", correct_b)
    if len(a) != len(b):
        raise ValueError(
            f"correct_a has {len(a)} examples and correct_b {len(b)}, but both must answer the same examples: "
            "evaluate both networks on one validation set."
        )
    return np.array([int((x & y).sum()) for x, y in ((a, b), (a, ~b), (~a, b), (~a, ~b))], dtype=np.int64)


def _correctness(name: str, values: Any) -> Tensor:
    """The checked vector [N] of booleans, on the CPU."""
    vector = torch.as_tensor(values).detach().cpu()
    if vector.ndim != 1 or len(vector) == 0:
        raise ValueError(
            f"{name} has shape {list(vector.shape)}, but must hold one value per example: give a vector [N], N >= 1."
        )
    if not bool(((vector == 0) | (vector == 1)).all()):
        raise ValueError(f"{name} must hold only 0 and 1 (wrong and right): give `predictions == labels`.")
    return vector.bool()
