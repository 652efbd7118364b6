"""What the hooks record, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import vgg11

from scale_guide import Guidance
from scale_guide.activations import Recorder
from scale_guide.layer_map import candidates
from scale_guide.rows import select


def outputs(recorder: Recorder, model: nn.Module, x: Any) -> dict[str, torch.Tensor]:
    with recorder.record():
        model(x)
    return {name: activation.output for name, activation in recorder.take().items()}


def test_records_only_inside_record() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    recorder = Recorder(model, ["0", "2"])
    model(torch.ones(2, 3))
    with pytest.raises(ValueError, match="'0' was chosen but did not run"):
        recorder.take()
    assert set(outputs(recorder, model, torch.ones(2, 3))) == {"0", "2"}
    recorder.close()
    assert not model[0]._forward_hooks


@pytest.mark.parametrize("known", [True, False])
def test_outputs_overwritten_in_place_are_copied(known: bool) -> None:
    """vgg11 overwrites 10 of its 11 weighted layers (ENGINE_FACTS, Hooks)."""
    model = vgg11().eval()
    names = candidates(model, "weights")
    plain = vgg11().eval()
    plain.load_state_dict(model.state_dict())
    for module in plain.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    x = torch.randn(2, 3, 224, 224)
    recorder = Recorder(model, names)
    with torch.no_grad():
        expected = outputs(Recorder(plain, names), plain, x)
        with recorder.record():
            model(x)
        first = recorder.take()
        overwritten = [name for name, activation in first.items() if activation.overwritten]
        assert len(overwritten) == 10
        if known:
            recorder.close()
            recorder = Recorder(model, names, overwritten=overwritten)
        second = outputs(recorder, model, x)
    for name in names:
        assert torch.equal(first[name].output, expected[name])
        assert torch.equal(second[name], expected[name])


def test_a_layer_first_overwritten_later_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    recorder = Recorder(model, ["0"])
    outputs(recorder, model, torch.ones(2, 3))
    model[1].inplace = True
    with pytest.raises(ValueError, match="inplace=False"):
        outputs(recorder, model, torch.ones(2, 3))


def test_tuples_time_first_and_packed_sequences() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.RNN(3, 5), nn.LSTM(5, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> Any:
            return self.second(self.first(x)[0].transpose(0, 1))

    model = Both()
    recorded = outputs(Recorder(model, ["first", "second"]), model, torch.randn(7, 2, 3))
    assert recorded["first"].shape == (2, 7, 5)
    assert recorded["second"].shape == (2, 7, 4)
    packed = nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    single = nn.Sequential(nn.RNN(3, 5))
    assert outputs(Recorder(single, ["0"]), single, packed)["0"].shape == (2, 4, 5)


class Checkpointed(nn.Module):
    """Two linear layers, the first under activation checkpointing."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.head, self.reentrant = nn.Linear(3, 4), nn.Linear(4, 2), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(checkpoint(lambda v: self.inner(v).tanh(), x, use_reentrant=self.reentrant))


def test_activation_checkpointing() -> None:
    torch.manual_seed(0)
    guide, x = nn.Sequential(nn.Linear(3, 6)), torch.randn(8, 3, requires_grad=True)
    gradients = []
    for model in (Checkpointed(False), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))):
        first = model.inner if isinstance(model, Checkpointed) else model[0]
        nn.init.constant_(first.bias, 0.1)
        first.weight.data = torch.linspace(-1, 1, 12).view(4, 3)
        guidance = Guidance(
            model, guide, target_layers=["inner" if isinstance(model, Checkpointed) else "0"], guide_layers=["0"]
        )
        with guidance.record():
            guidance.run_guide(x)
            output = model(x)
        (guidance.loss() + 0 * output.sum()).backward()
        gradients.append(first.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    model = Checkpointed(True)
    guidance = Guidance(model, guide, target_layers=["inner"], guide_layers=["0"])
    with guidance.record():
        guidance.run_guide(x)
        model(x)
    with pytest.raises(ValueError, match=r"'inner' carries no gradient.*use_reentrant=False"):
        guidance.loss()


def test_rows() -> None:
    sequence = torch.arange(24.0).view(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert select(sequence, "flatten")[0].shape == (2, 12)
    rows, weights, _ = select(sequence, "token", mask=mask, weights=torch.tensor([1.0, 0.0]))
    assert rows.shape == (6, 4)
    assert weights is not None
    assert weights.tolist() == [1, 1, 0, 0, 0, 0]
    assert torch.equal(select(sequence, "last", mask=mask).rows, sequence[[0, 1], [1, 2]])
    assert torch.equal(select(sequence, "last")[0], sequence[:, -1])
    assert torch.equal(select(sequence, "mean", mask=mask)[0][0], sequence[0, :2].mean(0))
    maps = torch.randn(2, 5, 3, 3)
    assert select(maps, "token", channels_first=True)[0].shape == (18, 5)
    torch.testing.assert_close(select(maps, "mean", channels_first=True)[0], maps.mean((2, 3)))
    with pytest.raises(ValueError, match="keep the sequence as it is"):
        select(sequence, "token", mask=mask[:, :2])
