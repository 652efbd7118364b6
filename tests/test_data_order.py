"""Which samples each process reads, and with which random numbers."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from scale_guide.data_order import (
    EvaluationOrder,
    SeededDataset,
    TrainOrder,
    WeightedCollate,
    WeightedDataset,
    batch_sizes,
    steps_per_epoch,
)

Key = tuple[int, int]


def make_order(rank: int = 0, world_size: int = 1, rows: int = 12, **changes: Any) -> TrainOrder:
    options = {"num_samples": 50, "batch_size": 12, "seed": 3, "first_step": 0, "last_step": 9} | changes
    return TrainOrder(**options, micro_batch_size=rows, rank=rank, world_size=world_size)


def global_batches(world_size: int, rows: int, num_steps: int = 9) -> list[list[Key]]:
    """Rows of each step in the order that the ranks' micro-batches say."""
    ranks = [list(make_order(rank, world_size, rows)) for rank in range(world_size)]
    k = 12 // (world_size * rows)
    return [
        [key for j in range(k) for rank in range(world_size) for key in ranks[rank][step * k + j]]
        for step in range(num_steps)
    ]


class Noise:
    """Samples drawn from the global generator, as augmentation is."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.cat([torch.tensor([float(index)]), torch.rand(3)])


@pytest.mark.parametrize(("world_size", "rows"), [(1, 4), (1, 1), (2, 6), (2, 3), (3, 2), (4, 3), (4, 1)])
def test_global_batch_is_the_same_for_any_processes_and_micro_batches(world_size: int, rows: int) -> None:
    assert global_batches(world_size, rows) == global_batches(1, 12)


def test_micro_batch_is_the_stated_slice_of_the_global_batch() -> None:
    whole = list(make_order())[5]
    assert list(make_order(rank=1, world_size=3, rows=2))[5 * 2 + 1] == whole[(1 * 3 + 1) * 2 :][:2]


def test_resume_equals_the_tail() -> None:
    whole = list(make_order(1, 2, 3))
    for first_step in (1, 4, 5, 8):  # an epoch has 4 steps
        assert list(make_order(1, 2, 3, first_step=first_step)) == whole[first_step * 2 :]


def test_each_sample_at_most_once_per_epoch_and_epochs_differ() -> None:
    order = make_order(last_step=12)
    keys = [key for batch in order for key in batch]
    assert len(keys) == len(set(keys)) == 12 * 12
    assert {epoch for epoch, _ in keys} == {0, 1, 2}
    by_epoch = [[index for epoch, index in keys if epoch == e] for e in range(3)]
    assert all(0 <= index < 50 for index in by_epoch[0])
    assert by_epoch[0] != by_epoch[1] != by_epoch[2]
    assert by_epoch[0] != list(range(48))


def test_seed_changes_the_order_and_length_is_right() -> None:
    assert list(make_order(seed=3)) == list(make_order(seed=3)) != list(make_order(seed=4))
    order = make_order(0, 2, 3, first_step=4)
    assert len(order) == len(list(order)) == 10


def test_fewer_samples_than_a_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"batch_size is 12, but the task has only 11.*at most 11"):
        make_order(num_samples=11)
    assert steps_per_epoch(50, 12) == 4


@pytest.mark.parametrize(
    ("num_samples", "rows", "world_size"), [(10, 4, 1), (10, 2, 3), (3, 4, 4), (16, 4, 2), (17, 4, 2)]
)
def test_evaluation_covers_each_sample_once_in_equal_batches(num_samples: int, rows: int, world_size: int) -> None:
    ranks = [list(EvaluationOrder(num_samples, rows, rank=r, world_size=world_size)) for r in range(world_size)]
    order = EvaluationOrder(num_samples, rows, rank=0, world_size=world_size)
    assert {len(batches) for batches in ranks} == {len(order)}
    assert {len(batch) for batches in ranks for batch in batches} == {rows}
    keys = [key for batches in ranks for batch in batches for key in batch]
    assert sorted(index for index, weight in keys if weight == 1) == list(range(num_samples))
    assert all(0 <= index < num_samples and weight in (0, 1) for index, weight in keys)
    assert len(keys) - num_samples < rows * world_size


def test_random_numbers_follow_seed_epoch_and_sample_alone() -> None:
    data = SeededDataset(Noise(), seed=0)
    first = data[1, 7]
    torch.rand(5)
    assert torch.equal(data[1, 7], first)
    others = [data[2, 7], data[1, 8], data[7, 1], SeededDataset(Noise(), seed=1)[1, 7]]
    assert all(not torch.equal(other[1:], first[1:]) for other in others)


def test_random_state_outside_is_untouched() -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    SeededDataset(Noise(), seed=0)[0, 0]
    assert torch.equal(torch.rand(2), expected)


def test_generators_of_gpus_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed would seed them too: without loader workers, the dropout of every step."""

    def fail(_seed: int) -> None:
        raise AssertionError("a sample seeded the GPU")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", fail)
    assert SeededDataset(Noise(), seed=0)[0, 0][0] == 0


def test_loader_workers_change_nothing() -> None:
    def read(num_workers: int) -> torch.Tensor:
        loader = DataLoader(SeededDataset(Noise(), 0), batch_sampler=make_order(0, 2, 3), num_workers=num_workers)  # type: ignore[arg-type]
        return torch.stack(list(loader))

    assert torch.equal(read(0), read(2))


def test_weighted_collate_multiplies_the_samples_weights() -> None:
    class Samples:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"input": torch.tensor(index), "weight": torch.tensor(float(index != 1))}

    def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}

    data = WeightedDataset(Samples())
    batch = WeightedCollate(collate)([data[0, 1.0], data[1, 1.0], data[2, 1.0], data[0, 0.0]])
    assert batch["weight"].tolist() == [1, 0, 1, 0]
    assert batch["weight"].dtype == torch.float32
    assert batch["input"].tolist() == [0, 1, 2, 0]


def test_everything_a_worker_gets_can_be_pickled() -> None:
    data = pickle.loads(pickle.dumps(SeededDataset(Noise(), 5)))
    assert torch.equal(data[0, 1], SeededDataset(Noise(), 5)[0, 1])


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((256, None, 2), (128, 1)), ((256, 32, 2), (32, 4)), ((4, 1, 4), (1, 1)), ((12, 4, 3), (4, 1))],
)
def test_batch_sizes(sizes: tuple[int, int | None, int], expected: tuple[int, int]) -> None:
    assert batch_sizes(*sizes) == expected


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, None, 1), r"training.batch_size is 3: .*at least 4 rows"),
        ((256, 0, 1), r"training.micro_batch_size is 0: it must be at least 1"),
        ((256, None, 3), r"batch_size is 256 on 3 processes: it must be a multiple of 3; set .* to 255 or 258"),
        ((5, None, 3), r"set training.batch_size to 6$"),
        (
            (100, 16, 2),
            r"micro_batch_size 16: .* multiple of 32; .* to 96 or 128, or training.micro_batch_size to 10$",
        ),
    ],
)
def test_batch_sizes_that_do_not_fit(sizes: tuple[int, int | None, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_sizes(*sizes)
