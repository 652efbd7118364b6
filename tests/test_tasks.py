"""Losses and scores of image classification, and copy-paste."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from scale_guide.tasks import Batch, copy_paste, image_classification, logits, parity

build = image_classification.build


def summarize(task: Any, sums: dict[str, Tensor]) -> dict[str, float]:
    result: dict[str, float] = task.summarize({name: value.item() for name, value in sums.items()})
    return result


# --- losses and scores


def image_batch(task: Any) -> tuple[Tensor, Batch]:
    generator = torch.Generator().manual_seed(0)
    target, weight = torch.randint(0, 10, (64,), generator=generator), torch.ones(64)
    weight[::7] = 0
    return torch.randn(64, 10, generator=generator), {"input": torch.zeros(64, 1), "target": target, "weight": weight}


def test_image_scores_against_a_plain_loop() -> None:
    task = build()
    output, batch = image_batch(task)
    losses, first, five = [], [], []
    for row, label, weight in zip(output.double(), batch["target"].tolist(), batch["weight"], strict=True):
        if weight:
            losses.append(float(row.logsumexp(0) - row[label]))
            rank = int((row > row[label]).sum())
            first.append(rank == 0)
            five.append(rank < 5)
    n = len(losses)
    assert task.count(batch).item() == n == 54
    assert task.loss(output, batch).item() == pytest.approx(sum(losses), rel=1e-5)
    result = summarize(task, task.scores(output, batch))
    assert result == pytest.approx(
        {"loss": sum(losses) / n, "accuracy": sum(first) / n, "top5_accuracy": sum(five) / n}
    )
    halves = [{k: v[part] for k, v in batch.items()} for part in (slice(0, 20), slice(20, 64))]
    parts = [task.scores(output[part], half) for part, half in zip((slice(0, 20), slice(20, 64)), halves, strict=True)]
    added = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    assert summarize(task, added) == pytest.approx(result)


def test_image_loss_has_no_gradient_from_unscored_rows() -> None:
    output, batch = image_batch(None)
    output.requires_grad_()
    build().loss(output, batch).backward()
    norms = output.grad.norm(dim=1)  # type: ignore[union-attr]
    assert torch.equal(norms > 0, batch["weight"] > 0)


def test_logits_of_outputs_and_of_half_precision() -> None:
    class Output:
        logits = torch.ones(2, 3, dtype=torch.bfloat16)

    assert logits(Output()).dtype == logits(Output.logits).dtype == torch.float32
    assert logits(torch.ones(2, dtype=torch.float64)).dtype == torch.float64


def test_fewer_than_five_classes_and_nothing_scored() -> None:
    task = build()
    batch = {"target": torch.tensor([0, 1]), "weight": torch.ones(2)}
    assert summarize(task, task.scores(torch.eye(2), batch))["top5_accuracy"] == 1
    batch["weight"] = torch.zeros(2)
    assert math.isnan(summarize(task, task.scores(torch.eye(2), batch))["accuracy"])


# --- copy-paste


def test_copy_paste_sample_is_what_the_paper_describes() -> None:
    task = copy_paste.build(num_train=300)
    assert task.facts == {"vocab_size": 13, "max_length": 82}
    lengths = []
    for i in range(300):
        sample = task.train[i]
        tokens, target, mask = (sample[key].tolist() for key in ("input", "target", "mask"))
        length = tokens.index(11)
        digits = tokens[:length]
        assert 20 <= length <= 40
        assert all(0 <= digit <= 9 for digit in digits)
        padding = [0] * (82 - 2 * length - 2)
        assert tokens == [*digits, 11, *[0] * length, 12, *padding]
        assert target == [*[0] * (length + 1), *digits, 12, *padding]
        assert mask == [True] * (2 * length + 2) + [False] * len(padding)
        lengths.append(length)
    assert set(lengths) == set(range(20, 41))


def test_copy_paste_samples_follow_seed_split_and_index_alone() -> None:
    first, longer, other = (copy_paste.build(num_train=n, seed=s) for n, s in ((10, 0), (20, 0), (10, 1)))
    assert all(torch.equal(first.train[i]["input"], longer.train[i]["input"]) for i in range(10))
    assert not torch.equal(first.train[0]["input"], first.validation[0]["input"])
    assert not torch.equal(first.train[0]["input"], other.train[0]["input"])
    assert len({tuple(longer.train[i]["input"].tolist()) for i in range(20)}) == 20
    assert sum(1 for _ in iter(first.train)) == 10
    assert pickle.loads(pickle.dumps(first)).train[3]["target"].equal(first.train[3]["target"])


def test_copy_paste_chance_and_loss_floor_are_the_papers() -> None:
    """A model that knows where a digit is due, but not which: 14.29 % and 27 ln 9 / 28 = 2.119."""
    task = copy_paste.build()
    batch = task.collate([task.train[i] for i in range(4000)])
    output = torch.full((*batch["input"].shape, 13), -100.0)
    output[..., 1:10] = 0
    ends = batch["input"] == 12
    output[ends] = -100.0
    output[..., 12][ends] = 0
    scores = summarize(task, task.scores(output, batch))
    assert task.count(batch).item() / 4000 == pytest.approx(28, rel=0.01)
    assert scores["accuracy"] == pytest.approx(0.1429, abs=0.003)
    assert scores["loss"] == pytest.approx(2.119, abs=0.003)
    assert scores["sequence_accuracy"] == 0
    assert task.loss(output, batch).item() / task.count(batch).item() == pytest.approx(scores["loss"], rel=1e-4)


def test_copy_paste_scores_leave_out_zeros_and_unweighted_rows() -> None:
    task = copy_paste.build(min_length=2, max_length=5)
    batch = task.collate([task.train[i] for i in range(6)])
    batch["weight"][4:] = 0
    output = functional.one_hot(batch["target"], 13) * 20.0
    output[batch["target"] == 0] = 20 * functional.one_hot(torch.tensor(7), 13).float()  # wrong, but not scored
    output[4:] = 0
    assert task.count(batch) == (batch["target"][:4] != 0).sum()
    perfect = summarize(task, task.scores(output, batch))
    assert perfect["accuracy"] == perfect["sequence_accuracy"] == 1
    assert perfect["loss"] < 1e-6
    output[0][batch["target"][0] == 12] = 0
    spoiled = summarize(task, task.scores(output, batch))
    assert spoiled["sequence_accuracy"] == 0.75
    assert spoiled["accuracy"] == pytest.approx(1 - 1 / task.count(batch).item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_length": 9, "max_length": 8}, "min_length is 9 and task.options.max_length is 8"),
        ({"min_length": 0}, "1 <= min_length"),
        ({"num_train": 0}, "task.options.num_train is 0"),
        ({"seed": -1}, "task.options.seed is -1"),
    ],
)
def test_copy_paste_bad_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        copy_paste.build(**options)


# --- parity


def test_parity_sample_is_what_the_paper_describes() -> None:
    task = parity.build(num_train=500)
    assert task.facts == {"vocab_size": 3, "num_classes": 2, "max_length": 50, "padding_id": 2}
    lengths, labels = set(), []
    for i in range(500):
        tokens, label, mask = (task.train[i][key].tolist() for key in ("input", "target", "mask"))
        length = tokens.index(2) if 2 in tokens else 50
        assert set(tokens[:length]) <= {0, 1}
        assert tokens[length:] == [2] * (50 - length)
        assert mask == [True] * length + [False] * (50 - length)
        assert label == tokens[:length].count(1) % 2
        lengths.add(length)
        labels.append(label)
    assert (min(lengths), max(lengths)) == (2, 50)
    assert 0.4 < sum(labels) / 500 < 0.6


def test_parity_scores_against_a_plain_loop() -> None:
    task = parity.build(max_length=6)
    batch = task.collate([task.train[i] for i in range(20)])
    batch["weight"][::3] = 0
    output = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    kept = [i for i in range(20) if i % 3]
    losses = [float(output[i].logsumexp(0) - output[i, batch["target"][i]]) for i in kept]
    right = [int(output[i].argmax()) == int(batch["target"][i]) for i in kept]
    assert task.count(batch).item() == len(kept)
    assert task.loss(output, batch).item() == pytest.approx(sum(losses), rel=1e-5)
    expected = {"loss": sum(losses) / len(kept), "accuracy": sum(right) / len(kept)}
    assert summarize(task, task.scores(output, batch)) == pytest.approx(expected)


def test_parity_samples_follow_seed_split_and_index_alone() -> None:
    first, longer, other = (parity.build(num_train=n, seed=s) for n, s in ((10, 0), (20, 0), (10, 1)))
    assert all(torch.equal(first.train[i]["input"], longer.train[i]["input"]) for i in range(10))
    assert not torch.equal(first.train[0]["input"], first.validation[0]["input"])
    assert not torch.equal(first.train[0]["input"], other.train[0]["input"])
    assert pickle.loads(pickle.dumps(first)).train[3]["input"].equal(first.train[3]["input"])


def test_parity_bad_options() -> None:
    with pytest.raises(ValueError, match=r"min_length is 9 and .*max_length is 8.*2 and 50"):
        parity.build(min_length=9, max_length=8)
