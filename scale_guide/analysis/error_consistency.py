"""Do two networks fail on the same examples?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def error_consistency(correct_a: Any, correct_b: Any) -> float:
    """Cohen's kappa of two correctness vectors, from -1 to 1; 0 is what two independent networks would reach.

    kappa = (observed - expected) / (1 - expected), where `observed` is the share of examples on which both are right
    or both are wrong, and `expected` = a * b + (1 - a) * (1 - b) the share that their accuracies a and b alone would
    give (Geirhos et al. 2020, "Beyond accuracy", eq. 1 to 3). Two networks that never differ get 1, also where kappa
    is 0 / 0 because both are right (or both wrong) everywhere.

    Args:
        correct_a: [N] booleans (or 0 and 1), any array-like or tensor: was example n answered correctly?
        correct_b: [N] the same for the other network, over the same examples in the same order.

    Raises:
        ValueError: a vector is empty or not one-dimensional, holds something else than 0 and 1, or the lengths differ.
    """
    a, b = _correctness("correct_a", correct_a), _correctness("correct_b", correct_b)
    if len(a) != len(b):
        raise ValueError(
            f"correct_a has {len(a)} examples and correct_b {len(b)}, but both must answer the same examples: "
            "evaluate both networks on one validation set."
        )
    num_examples, num_a, num_b = len(a), int(a.sum()), int(b.sum())
    num_equal = int((a == b).sum())
    if num_equal == num_examples:
        return 1.0
    # Whole numbers up to the last division: no rounding, and `expected` cannot be 1 here, since the two differ.
    expected = num_a * num_b + (num_examples - num_a) * (num_examples - num_b)
    return (num_equal * num_examples - expected) / (num_examples**2 - expected)


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
