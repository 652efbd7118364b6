"""Trained weights for the guide: every place they may come from, and what is said of those that do not fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, resnet18

from scale_guide.guide_weights import load_weights
from scale_guide.models import transformer


def network(width: int = 4, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def save(kind: str, state: dict[str, Tensor], folder: Path) -> str:
    """Writes a state dict as one of the kinds; returns what to give as guide.weights."""
    if kind == "run":
        (folder / "run/target").mkdir(parents=True)
        save_file(state, folder / "run/target/model.safetensors")
        return str(folder / "run")
    file = folder / f"weights.{'pth' if kind == 'wrapped' else kind}"
    if kind == "safetensors":
        save_file(state, file)
    else:
        wrapped: Any = {"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}
        torch.save(wrapped if kind == "wrapped" else state, file)
    return str(file)


@pytest.mark.parametrize("kind", ["safetensors", "pt", "pth", "wrapped", "run"])
def test_files_and_run_folders(kind: str, tmp_path: Path) -> None:
    wanted, guide = network(seed=1), network()
    weights = save(kind, wanted.state_dict(), tmp_path)
    load_weights(guide, weights, "any")
    assert same(guide, wanted)


def test_an_old_batch_norm_without_its_counter_lacks_nothing(tmp_path: Path) -> None:
    state = {name: value for name, value in network(seed=1).state_dict().items() if "num_batches" not in name}
    guide = network()
    load_weights(guide, save("pt", state, tmp_path), "any")
    assert torch.equal(guide.state_dict()["0.weight"], state["0.weight"])


def told(guide: nn.Module, weights: str, model: str = "any") -> str:
    with pytest.raises(ValueError, match=r"^guide\.weights") as caught:
        load_weights(guide, weights, model)
    message = str(caught.value)
    assert len(message) < 900, "not a page of text"
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_another_architecture(kind: str, tmp_path: Path) -> None:
    """How many tensors differ, the first three, and the fix."""
    message = told(network(), save(kind, network(width=6).state_dict(), tmp_path))
    assert "does not fit the guide Sequential in 7 tensors: 0.weight is [6, 3], the guide's [4, 3]; " in message
    assert message.count(";") == 2
    assert "and 4 more" in message
    state = network().state_dict()
    state["extra"] = state.pop("2.bias")
    message = told(network(), save(kind, state, tmp_path))
    assert "in 2 tensors: 2.bias is missing; extra is not in the guide. Give the weights of" in message


@pytest.mark.parametrize("kind", ["safetensors", "pt", "pth"])
@pytest.mark.parametrize("left", [0, 10, 0.5, 0.95])
def test_truncated(kind: str, left: float, tmp_path: Path) -> None:
    file = Path(save(kind, network().state_dict(), tmp_path))
    content = file.read_bytes()
    file.write_bytes(content[: int(left if left > 1 else left * len(content))])
    assert f"{file} is not a whole file of weights" in told(network(), str(file))


def test_no_weights_at_all(tmp_path: Path) -> None:
    assert "weights.pt does not exist. Give a .safetensors" in told(network(), str(tmp_path / "weights.pt"))
    (tmp_path / "empty").mkdir()
    assert "model.safetensors does not exist" in told(network(), str(tmp_path / "empty"))
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    assert "holds no state dict. Save one" in told(network(), str(tmp_path / "other.pt"))
    torch.save(network(), tmp_path / "whole.pt")
    assert "must hold tensors alone" in told(network(), str(tmp_path / "whole.pt")), "code in a file is not run"


def test_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, from torch's own cache of downloads; without the network an error that says what to do."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    model = "torchvision.models:resnet18"
    message = told(resnet18(), "torchvision:DEFAULT", model)
    assert "could not be fetched or read (" in message
    assert "fetch them on another machine and give their file" in message
    assert "mean 'IMAGENET1K_V1'?). Known: DEFAULT, IMAGENET1K_V1" in told(resnet18(), "torchvision:IMAGENET2K", model)
    message = told(resnet18(), "torchvision:DEFAULT", "deep_fcn")
    assert "is for a guide of torchvision, and guide.name is 'deep_fcn'" in message
    # What a download leaves in the cache: its name ends in the first digits of its hash.
    name = ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    torch.manual_seed(1)
    wanted, guide = resnet18(), resnet18()
    torch.save(wanted.state_dict(), tmp_path / "hub/checkpoints" / name)
    load_weights(guide, "torchvision:DEFAULT", model)
    assert same(guide, wanted)
    assert "fc.weight is [1000, 512], the guide's [10, 512]" in told(
        resnet18(num_classes=10), "torchvision:DEFAULT", model
    )


def no_network(*_: Any, **__: Any) -> Any:
    raise OSError("no route to host")


def test_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of save_pretrained, for a guide that holds a model of transformers."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or it would try again and again
    options = {"vocab_size": 11, "max_length": 6, "layers": 2, "width": 8, "heads": 2, "feedforward": 8}
    torch.manual_seed(1)
    wanted, guide = transformer.build(**options), transformer.build(**options)  # type: ignore[arg-type]
    inner = next(m for m in wanted.modules() if hasattr(m, "save_pretrained"))
    inner.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    assert not same(guide, wanted)
    load_weights(guide, f"transformers:{tmp_path / 'saved'}", "transformer")
    assert same(guide, wanted)
    other = transformer.build(**(options | {"layers": 3}))  # type: ignore[arg-type]
    message = told(other, f"transformers:{tmp_path / 'saved'}")
    assert re.search(r"in 12 tensors: \S*h\.2\.\S+ is missing; .* and 9 more", message)
    assert "could not be fetched or read (" in told(guide, "transformers:no_one/no_such_model")
    assert "Sequential holds none" in told(network(), f"transformers:{tmp_path / 'saved'}")
