"""Models of this package: sizes, causality, and that they run on meta tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from scale_guide.models import deep_fcn, plain_resnet, rnn, transformer, transformer_encoder, wide_fcn

small_rnn = partial(rnn.build, vocab_size=11, embedding=8, hidden=16, layers=3)
small_transformer = partial(
    transformer.build, vocab_size=11, max_length=12, layers=2, width=16, heads=4, feedforward=32
)
SEQUENCE_MODELS = {
    "rnn": small_rnn,
    "lstm": partial(small_rnn, cell="lstm"),
    "gru": partial(small_rnn, cell="gru"),
    "transformer": small_transformer,
}
sequence_models = pytest.mark.parametrize("build", SEQUENCE_MODELS.values(), ids=SEQUENCE_MODELS)
CLASSIFIERS = {
    "rnn": partial(rnn.build, embedding=8, hidden=16, layers=2),
    "lstm": partial(rnn.build, embedding=8, hidden=16, layers=2, cell="lstm"),
    "transformer_encoder": partial(transformer_encoder.build, max_length=12, width=16, heads=4, feedforward=32),
}
classifiers = pytest.mark.parametrize(
    "build",
    [partial(build, vocab_size=4, num_classes=5, padding_id=3) for build in CLASSIFIERS.values()],
    ids=CLASSIFIERS,
)


def move_by_last_token(model: nn.Module) -> torch.Tensor:
    """Largest change of the logits at each position when only the last token changes."""
    model.eval()
    tokens = torch.randint(0, 10, (2, 12))
    changed = tokens.clone()
    changed[:, -1] = 10
    with torch.no_grad():
        return (model(tokens) - model(changed)).abs().amax((0, 2))


def test_deep_fcn_has_the_papers_size() -> None:
    with torch.device("meta"):
        model = deep_fcn.build(num_classes=1000, input_shape=(3, 224, 224))
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 49
    assert [(m.in_features, m.out_features) for m in linears[:3]] == [(150528, 2048), (2048, 1024), (1024, 1024)]
    assert len([m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]) == 48
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(360e6, rel=0.01)


def test_wide_fcn_has_the_papers_size() -> None:
    with torch.device("meta"):
        model = wide_fcn.build(num_classes=1000, input_shape=(3, 224, 224))
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    linears = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]
    assert linears == [(150528, 8192), (8192, 8192), (8192, 8192), (8192, 1000)]
    kinds = [type(m) for m in model.hidden[0].children()]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.376e9, rel=0.001)


def test_plain_resnet_is_resnet_50_without_its_ways_round() -> None:
    with torch.device("meta"):
        model = plain_resnet.build(num_classes=1000)
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
        whole = torchvision.models.resnet50()
    kept = {name: p.shape for name, p in whole.named_parameters() if "downsample" not in name}
    assert {name: p.shape for name, p in model.named_parameters()} == kept
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(22.8e6, rel=0.002)


def test_plain_resnet_has_no_way_round_a_block() -> None:
    """A block whose last BatchNorm gives zero passes nothing on; ResNet-50's would pass its input."""
    torch.manual_seed(0)
    model = plain_resnet.build(num_classes=3, blocks=[1, 1, 1, 1], width_per_group=4).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(*model(images))
        nn.init.zeros_(model.layer2[0].bn3.weight)
        assert torch.equal(*model(images))


def test_deep_fcn_follows_its_options() -> None:
    model = deep_fcn.build(
        num_classes=3, input_shape=(1, 4, 4), depth=2, first_width=7, width=5, dropout=0.0, batch_norm=False
    )
    kinds = [type(m) for m in model.modules() if not list(m.children())]
    assert kinds == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert [m.out_features for m in model.modules() if isinstance(m, nn.Linear)] == [7, 5, 3]


def test_deep_fcn_overwrites_no_captured_output() -> None:
    model = deep_fcn.build(num_classes=3, input_shape=(1, 4, 4), depth=3, first_width=8, width=8, batch_norm=False)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _m, _i, output: kept.append((output, output.detach().clone())))
    model(torch.randn(4, 1, 4, 4))
    assert len(kept) == 4
    assert all(torch.equal(output, copy) for output, copy in kept)


@sequence_models
def test_causal(build: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    moved = move_by_last_token(build())
    assert moved[:-1].max() == 0
    assert moved[-1] > 1e-3


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_leaky_state_lets_the_future_in(cell: str) -> None:
    torch.manual_seed(0)
    assert move_by_last_token(small_rnn(cell=cell, leaky_state=True))[0] > 1e-3


@sequence_models
def test_sequence_models_run_on_meta_without_a_warning(build: Callable[..., nn.Module]) -> None:
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("error")
        assert build(dropout=0.1)(torch.zeros(2, 12, dtype=torch.int64)).shape == (2, 12, 11)


def test_transformer_is_quiet(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    small_transformer()(torch.zeros(2, 12, dtype=torch.int64))
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_transformer_equals_the_plain_gpt2_and_shares_no_weights() -> None:
    model = small_transformer().eval()
    tokens = torch.randint(0, 11, (2, 12))
    torch.testing.assert_close(model(tokens), model.gpt2(tokens).logits)
    storages = [p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False)]
    assert len(storages) == len(set(storages))


@sequence_models
def test_every_weight_gets_a_gradient(build: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    model = build()
    (model(torch.randint(0, 11, (2, 12))) * torch.randn(2, 12, 11)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@classifiers
def test_classifier_reads_no_padding(build: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    tokens = torch.randint(0, 3, (4, 12))
    lengths = [1, 5, 11, 12]
    for row, length in zip(tokens, lengths, strict=True):
        row[length:] = 3
    together = model(tokens)
    assert together.shape == (4, 5)
    for row, length, logits in zip(tokens, lengths, together, strict=True):
        torch.testing.assert_close(model(row[None, :length])[0], logits)
        changed = row[None, :length].clone()
        changed[0, length - 1] = (changed[0, length - 1] + 1) % 3
        assert (model(changed)[0] - logits).abs().max() > 1e-3  # the last real token is read


@classifiers
def test_classifiers_run_on_meta_and_give_every_weight_a_gradient(build: Callable[..., nn.Module]) -> None:
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("error")
        assert build(dropout=0.1)(torch.zeros(2, 12, dtype=torch.int64)).shape == (2, 5)
    torch.manual_seed(0)
    model = build()
    (model(torch.randint(0, 4, (8, 12))) * torch.randn(8, 5)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_transformer_encoder_equals_bert_with_its_own_mask() -> None:
    torch.manual_seed(0)
    model = CLASSIFIERS["transformer_encoder"](vocab_size=4, num_classes=5, padding_id=3).eval()
    tokens = torch.randint(0, 4, (3, 12))
    real = tokens != 3
    hidden = model.bert(tokens, attention_mask=real.long()).last_hidden_state
    means = torch.stack([row[keep].mean(dim=0) for row, keep in zip(hidden, real, strict=True)])
    torch.testing.assert_close(model(tokens), model.head(means))


@pytest.mark.parametrize("name", ["transformer", "transformer_encoder"])
def test_transformers_refuse_sequences_longer_than_their_positions(name: str) -> None:
    """On meta tensors too, where layers are traced before training: an index out of range passes unseen there."""
    build = {"transformer": small_transformer, "transformer_encoder": CLASSIFIERS["transformer_encoder"]}[name]
    facts = {"vocab_size": 4, "num_classes": 5, "padding_id": 3} if name == "transformer_encoder" else {}
    with torch.device("meta"), pytest.raises(ValueError, match=f"max_length of {name} is 12.*have 13 tokens"):
        build(**facts)(torch.zeros(2, 13, dtype=torch.int64))


def test_stacked_rnn_is_a_list_of_one_layer_modules_of_the_stated_sizes() -> None:
    model = rnn.build(vocab_size=13)
    assert [(m.input_size, m.hidden_size, m.num_layers) for m in model.modules() if isinstance(m, nn.RNN)] == [
        (256, 512, 1),
        (512, 512, 1),
        (512, 512, 1),
        (512, 512, 1),
    ]


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (
            deep_fcn.build,
            {"num_classes": 2, "input_shape": (1, 2, 2), "depth": 0},
            "depth of deep_fcn is 0.*at least 1",
        ),
        (
            wide_fcn.build,
            {"num_classes": 2, "input_shape": (1, 2, 2), "depth": 0},
            "depth of wide_fcn is 0.*at least 1",
        ),
        (plain_resnet.build, {"num_classes": 2, "blocks": [3, 4, 6]}, r"blocks of plain_resnet is \[3, 4, 6\].*four"),
        (rnn.build, {"vocab_size": 3, "cell": "lstn"}, "rnn: cell='lstn' .*mean 'lstm'.*gru, lstm, rnn"),
        (rnn.build, {"vocab_size": 3, "layers": 0}, "layers of rnn is 0"),
        (
            transformer.build,
            {"vocab_size": 3, "max_length": 4, "width": 30, "heads": 4},
            "heads of transformer is 4 and width is 30.*to 3",
        ),
        (
            transformer_encoder.build,
            {"vocab_size": 3, "num_classes": 2, "max_length": 4, "padding_id": 2, "width": 30, "heads": 0},
            "heads of transformer_encoder is 0 and width is 30.*to 1",
        ),
    ],
)
def test_options_that_make_no_model(build: Callable[..., nn.Module], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)
