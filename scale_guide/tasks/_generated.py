"""Sequences made by a rule: samples that are a function of (seed, split, index) alone.

Nothing is stored, and no order, process count or resumption changes them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Make = Callable[[np.random.Generator, int, int], dict[str, Tensor]]
"""random, length, longest length -> the tensors of one sample."""


class GeneratedSequences:
    """`num_samples` samples of `make`, of lengths uniform in lengths[0]..lengths[1]; each also has `weight` 1."""

    def __init__(self, make: Make, num_samples: int, lengths: tuple[int, int], *, seed: int, split: int) -> None:
        self.make = make
        self.num_samples = num_samples
        self.lengths = lengths
        self.seed = seed
        self.split = split

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sample number `index`."""
        if not 0 <= index < self.num_samples:
            raise IndexError(index)
        shortest, longest = self.lengths
        random = np.random.default_rng((self.seed, self.split, index))
        length = int(random.integers(shortest, longest + 1))
        return {**self.make(random, length, longest), "weight": torch.ones(())}


def make_splits(
    make: Make, *, lengths: tuple[int, int], papers: tuple[int, int], sizes: tuple[int, int], seed: int
) -> tuple[GeneratedSequences, GeneratedSequences]:
    """Training and validation samples.

    Args:
        make: Makes one sample.
        lengths: task.options.min_length and max_length.
        papers: What the paper takes for them, for messages.
        sizes: task.options.num_train and num_validation.
        seed: task.options.seed.

    Raises:
        ValueError: a length, count or seed that makes no data.
    """
    if not 1 <= lengths[0] <= lengths[1]:
        raise ValueError(
            f"task.options.min_length is {lengths[0]} and task.options.max_length is {lengths[1]}: lengths must hold "
            f"1 <= min_length <= max_length; the paper takes {papers[0]} and {papers[1]}"
        )
    named = (("num_train", sizes[0], 1), ("num_validation", sizes[1], 1), ("seed", seed, 0))
    for name, value, least in named:
        if value < least:
            raise ValueError(f"task.options.{name} is {value}: it must be at least {least}; set a larger one")
    train, validation = (GeneratedSequences(make, n, lengths, seed=seed, split=i) for i, n in enumerate(sizes))
    return train, validation
