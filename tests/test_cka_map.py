"""Maps of CKA against literal sums over minibatches, on what fp32 can spoil, and on networks whose map is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st
from reference import cka as literal_cka
from reference import related_rows, unbiased_hsic
from torch import Tensor, nn
from torchvision.models import resnet18

from scale_guide.analysis.cka_map import Comparison, cka, compare, hsic
from scale_guide.engine import Engine
from scale_guide.evaluate import Samples
from scale_guide.models import deep_fcn, transformer_encoder
from scale_guide.networks import Network
from scale_guide.statistics.gram import gram_of
from scale_guide.tasks import image_classification, parity


def network(module: nn.Module, layers: str | list[str] = "weights") -> Network:
    return Network(module.eval(), layers, module)


def small(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return deep_fcn.build(num_classes=5, input_shape=(12, 1, 1), depth=2 + seed, first_width=16, width=8)


def toy_samples(num_rows: int = 0, unreadable: int | None = None) -> Samples:
    task: Any = toy.build()
    task.validation = toy.Rows(37, 1, unreadable, noise=0.0)
    return Samples(task, num_rows, batch_size=10)


def literal_map(modules: list[nn.Module], samples: Samples) -> Tensor:
    """CKA of all hidden linear layers, from HSIC_1 of each minibatch in float64, weighted by its rows."""
    sums: Any = 0
    for _, batch in samples.batches(Engine(), ""):
        grams = []
        for module in modules:
            x = batch["input"].flatten(1)
            for block in module.hidden:  # type: ignore[union-attr]
                rows = block.linear(x).double().detach()
                grams.append((rows - rows.mean(0)) @ (rows - rows.mean(0)).T)
                x = block(x)
        sums = sums + len(x) * torch.stack([torch.stack([unbiased_hsic(k, ell) for ell in grams]) for k in grams])
    return sums / torch.outer(sums.diagonal(), sums.diagonal()).sqrt()


@pytest.mark.parametrize("unreadable", [None, 5])
def test_agrees_with_a_literal_computation(unreadable: int | None) -> None:
    """37 samples in minibatches of 10, 9, 9 and 9; an unreadable one is left out."""
    samples, modules = toy_samples(unreadable=unreadable), [small(0), small(1)]
    found = compare({"a": network(modules[0]), "b": network(modules[1])}, samples, Engine())
    assert found.layers == {
        "a": ["hidden.0.linear", "hidden.1.linear"],
        "b": ["hidden.0.linear", "hidden.1.linear", "hidden.2.linear"],
    }
    assert found.num_rows == found.num_points == (37 if unreadable is None else 36)
    torch.testing.assert_close(found.values, literal_map(modules, samples), atol=1e-6, rtol=0)
    assert not any(module._forward_hooks for network in modules for module in network.modules())
    assert found.between("b", "a") == found.values[2:, :2].tolist()
    assert found.between("b", "b") == found.values[2:, 2:].tolist()


def test_the_map_of_a_resnet_against_itself_has_ones_on_its_diagonal() -> None:
    module = resnet18(num_classes=10)
    samples = Samples(image_classification.build(), 48, batch_size=24)
    found = compare({"resnet": network(module)}, samples, Engine())
    assert len(found.layers["resnet"]) == 20
    torch.testing.assert_close(found.values.diagonal(), torch.ones(20, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (found.values - found.values.T).abs().max() < 1e-12
    assert float(found.values.min()) < 0.99
    assert all(1 < value < 20 for value in found.dimensions["resnet"])


@given(st.integers(4, 9), st.integers(1, 4), st.integers(0, 10**6))
def test_hsic_of_all_pairs(m: int, num_layers: int, seed: int) -> None:
    half = torch.randn(num_layers, m, m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    grams = half + half.transpose(1, 2)
    expected = torch.stack([torch.stack([m * unbiased_hsic(k, ell) for ell in grams]) for k in grams])
    torch.testing.assert_close(hsic(grams), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (1000.0, 1.0), (0.0, 1e9), (0.0, 1e-9)])
def test_fp32_rows_far_from_zero_large_and_small(mean: float, scale: float) -> None:
    x, y = (scale * rows.float() for rows in related_rows(64, 20_000, 50, mean=mean))
    found = cka(hsic(torch.stack([gram_of(x), gram_of(y)])))
    assert float(found[0, 1]) == pytest.approx(float(literal_cka(x, y, "debiased")), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_padding_has_the_mean_of_its_column(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4, 2, 5])[:, None]
    rows = torch.randn(6, 5, 4000, generator=generator).to(dtype).masked_fill(~mask[..., None], 0).flatten(1)
    filled = rows.double()
    for column in range(filled.shape[1]):
        real = mask[:, column // 4000]
        filled[~real, column] = filled[real, column].mean()
    filled -= filled.mean(0)
    before = rows.clone()
    expected = filled @ filled.T
    assert (gram_of(rows, mask) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(rows, before), "the activations are not ours to change"


def test_unrelated_rows_have_no_similarity_however_few() -> None:
    generator = torch.Generator().manual_seed(0)
    sums = torch.zeros(2, 2)
    for _ in range(500):
        sums = sums + hsic(torch.stack([gram_of(torch.randn(8, 300, generator=generator)) for _ in "xy"]))
    # Each of eight rows alone would give a biased CKA of about 0.98.
    assert abs(float(cka(sums)[0, 1])) < 0.1


def dead(layer: nn.Linear, value: float) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, value)


def compared(module: nn.Module) -> Comparison:
    return compare({"it": network(module)}, toy_samples(), Engine())


def test_a_layer_without_spread_is_similar_to_nothing() -> None:
    module: Any = small(1)
    dead(module.hidden[1].linear, 0.3)
    found = compared(module)
    assert found.values[1].tolist() == found.values[:, 1].tolist() == [0, 0, 0]
    assert math.isnan(found.dimensions["it"][1])
    assert not math.isnan(found.dimensions["it"][0])


def test_activations_that_are_not_finite_are_told_with_their_layer() -> None:
    module: Any = small(1)
    dead(module.hidden[1].linear, math.inf)
    with pytest.raises(ValueError, match=r"it: the activations of layer 'hidden.1.linear' hold inf or NaN"):
        compared(module)


def test_padded_sequences() -> None:
    """Padding says nothing: what a network makes of it changes no number."""
    task = parity.build(min_length=2, max_length=12, num_train=8, num_validation=40)
    options = {"width": 16, "heads": 2, "feedforward": 16, "max_length": 12}
    module = transformer_encoder.build(vocab_size=3, num_classes=2, padding_id=2, **options)  # type: ignore[arg-type]
    one = compare({"it": network(module)}, Samples(task, batch_size=20), Engine())
    assert one.num_rows == 40
    assert one.values.diagonal().min() > 0.999
    embedding = module.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        embedding[2] += torch.randn(16)
    other = compare({"it": network(module)}, Samples(task, batch_size=20), Engine())
    torch.testing.assert_close(one.values, other.values, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"num_rows": 3}, "--rows: 3 samples are too few"),
        ({"batch_size": 7}, "--batch_size: 7 samples are too few.*at least 8"),
        ({"num_rows": -1}, "--rows=-1 must be at least 0"),
        ({"batch_size": 0}, "--batch_size=0 must be at least 1"),
    ],
)
def test_too_few_samples(samples: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare({"it": network(small(0))}, Samples(toy.build(), **samples), Engine())  # type: ignore[arg-type]


def test_a_network_that_cannot_read_the_samples() -> None:
    with pytest.raises(ValueError, match=r"it cannot read the samples of this task, of shape 12 \(RuntimeError: "):
        compare({"it": network(resnet18())}, toy_samples(), Engine())
    with pytest.raises(ValueError, match="it has no layers to compare beside its output"):
        compare({"it": network(nn.Sequential(nn.Linear(12, 5)))}, toy_samples(), Engine())
