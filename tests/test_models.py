"""Models of this package: sizes, causality, and that they run on meta tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from scale_guide.models import deep_fcn, rnn, transformer

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
        (rnn.build, {"vocab_size": 3, "cell": "lstn"}, "rnn: cell='lstn' .*mean 'lstm'.*gru, lstm, rnn"),
        (rnn.build, {"vocab_size": 3, "layers": 0}, "layers of rnn is 0"),
        (
            transformer.build,
            {"vocab_size": 3, "max_length": 4, "width": 30, "heads": 4},
            "heads of transformer is 4 and width is 30.*to 3",
        ),
    ],
)
def test_options_that_make_no_model(build: Callable[..., nn.Module], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)
