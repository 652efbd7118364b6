"""Noise in place of data: what it is drawn from, what it follows, and what of a batch it leaves as it was."""

from __future__ import annotations

import pytest
import torch
import toy
from torch import Tensor

from scale_guide.config import GuideConfig, Recipe
from scale_guide.reading import Draws, check_inputs, with_noise
from scale_guide.tasks import copy_paste, parity


def test_noise_is_a_function_of_seed_step_and_place_in_the_global_batch() -> None:
    """2 processes x 3 micro-batches read what 1 x 6 do; no two micro-batches, steps or seeds read the same."""
    batch = {"input": torch.zeros(5, 2, 3), "weight": torch.tensor([1.0, 1, 0, 1, 1])}
    task = toy.build()

    def noise(k: int, rank: int, world_size: int, *, seed: int = 7, step: int = 3) -> list[Tensor]:
        made = with_noise([batch] * k, "noise", task, Draws(seed, step, rank, world_size))
        assert all(torch.equal(one["weight"], batch["weight"]) for one in made), "an unreadable sample stays one"
        return [one["input"] for one in made]

    whole = noise(6, 0, 1)
    for rank in (0, 1):
        for j, part in enumerate(noise(3, rank, 2)):
            assert torch.equal(part, whole[2 * j + rank])
    others = [*whole, *noise(1, 0, 1, seed=8), *noise(1, 0, 1, step=4)]
    assert len({float(values.sum()) for values in others}) == 8
    assert not batch["input"].any(), "the batch itself is as it was"


def test_noise_of_numbers() -> None:
    batch, draws = {"input": torch.zeros(64, 500)}, Draws(seed=0, step=0)
    (normal,) = with_noise([batch], "noise", toy.build(), draws)
    assert abs(float(normal["input"].mean())) < 0.02
    assert float(normal["input"].std()) == pytest.approx(1, abs=0.02)
    (released,) = with_noise([batch], "released_noise", toy.build(), draws)
    assert torch.equal(released["input"], (1.1 * normal["input"]).clamp(0, 1))


def test_noise_holds_no_padding_of_its_own() -> None:
    """Models read lengths off the padding, and a token of it among the others would shorten the sequence."""
    task = parity.build(max_length=9, num_train=40, num_validation=1)
    batch = task.collate([task.train[i] for i in range(40)])
    (noisy,) = with_noise([batch], "noise", task, Draws(seed=0, step=0))
    assert set(noisy["input"][batch["mask"]].tolist()) == {0, 1}
    assert set(noisy["input"][~batch["mask"]].tolist()) == {2}


def test_noise_of_tokens_keeps_lengths() -> None:
    task = copy_paste.build(min_length=2, max_length=30, num_train=40, num_validation=1)
    batch = task.collate([task.train[i] for i in range(40)])
    (noisy,) = with_noise([batch], "noise", task, Draws(seed=0, step=0))
    tokens, mask = noisy["input"], batch["mask"]
    assert tokens.dtype == batch["input"].dtype
    assert set(tokens[mask].tolist()) == set(range(13))
    assert torch.equal(tokens[~mask], batch["input"][~mask])
    assert not torch.equal(tokens[mask], batch["input"][mask])
    recipe = Recipe(guide=GuideConfig(input="noise"))
    check_inputs(recipe, task, 8)
    del task.facts["vocab_size"]
    with pytest.raises(ValueError, match=r"guide\.input: noise .* no vocab_size"):
        check_inputs(recipe, task, 8)
    check_inputs(Recipe(), task, 8)
