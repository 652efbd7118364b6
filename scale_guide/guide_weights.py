"""Trained weights for the guide: where a recipe says they are, and whether they fit."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from scale_guide.lookup import unknown

TORCHVISION, TRANSFORMERS = "torchvision:", "transformers:"
FIX = (
    "Give a .safetensors, .pt or .pth file, the folder of a finished run, the name of an earlier variant, "
    "torchvision:NAME or transformers:NAME"
)
_NUM_LISTED = 3


def weights_file(weights: str) -> Path | None:
    """Returns the file that guide.weights means; None for weights that a library fetches by name.

    Raises:
        ValueError: it does not exist.
    """
    if weights.startswith((TORCHVISION, TRANSFORMERS)):
        return None
    path = Path(weights)
    file = path / "target" / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"guide.weights={weights!r} is no variant trained before, and {file} does not exist. {FIX}.")
    return file


def load_weights(network: nn.Module, weights: str, model: str) -> None:
    """Fills a guide with the weights that guide.weights means.

    Args:
        network: The guide.
        weights: The value of guide.weights.
        model: The value of guide.name, for the weights of torchvision.

    Raises:
        ValueError: weights that are not there, cannot be read or fetched, or belong to another architecture.
    """
    file = weights_file(weights)
    if file is not None:
        _fill(network, _read(file, weights), weights)
    elif weights.startswith(TORCHVISION):
        _fill(network, _from_torchvision(weights, model), weights)
    else:
        _load_transformers(network, weights)


def _read(file: Path, weights: str) -> dict[str, Tensor]:
    """Returns the tensors of a file by name."""
    unreadable = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except unreadable as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(
            f"guide.weights={weights!r}: {file} is not a whole file of weights ({why}). Copy or save it anew; a .pt "
            "or .pth file must hold tensors alone."
        ) from error
    for key in ("state_dict", "model"):  # how Lightning and torchvision's own training wrap them
        found = found[key] if isinstance(found, Mapping) and isinstance(found.get(key), Mapping) else found
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(
            f"guide.weights={weights!r}: {file} holds no state dict. Save one: torch.save(model.state_dict(), ...)."
        )
    state = dict(found)
    consume_prefix_in_state_dict_if_present(state, "module.")
    return state


def _fill(network: nn.Module, state: Mapping[str, Tensor], weights: str) -> None:
    """Copies tensors into the network; an error counts what does not fit and lists the first three."""
    own = network.state_dict()
    wrong = [
        f"{name} is {list(state[name].shape)}, the guide's {list(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    # What is left out is told by load_state_dict: an older BatchNorm without its counter lacks nothing.
    same = {name: value for name, value in state.items() if name not in own or value.shape == own[name].shape}
    result = network.load_state_dict(same, strict=False)
    missing = [f"{name} is missing" for name in result.missing_keys if name not in state]
    problems = wrong + missing + [f"{name} is not in the guide" for name in result.unexpected_keys]
    if problems:
        more = f" and {len(problems) - _NUM_LISTED} more" if len(problems) > _NUM_LISTED else ""
        raise ValueError(
            f"guide.weights={weights!r} does not fit the guide {type(network).__name__} in {len(problems)} tensors: "
            f"{'; '.join(problems[:_NUM_LISTED])}{more}. Give the weights of the network that guide.name and "
            "guide.options build, or make these the network of the weights."
        )


def _from_torchvision(weights: str, model: str) -> dict[str, Tensor]:
    from torchvision.models import get_model_weights, list_models  # slow to import, and needed here alone

    name = model.removeprefix("torchvision.models:")
    if name == model or name not in list_models():
        raise ValueError(
            f"guide.weights={weights!r} is for a guide of torchvision, and guide.name is {model!r}. Give "
            "torchvision.models:NAME, such as torchvision.models:resnet18, or weights of another kind."
        )
    known, wanted = get_model_weights(name), weights.removeprefix(TORCHVISION)
    if wanted not in known.__members__:
        raise unknown(f"guide.weights: torchvision's weights of {name}", wanted, known.__members__)
    try:
        state: dict[str, Tensor] = known[wanted].get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise _unfetched(weights, error) from error
    return state


def _load_transformers(network: nn.Module, weights: str) -> None:
    from transformers import PreTrainedModel  # slow to import, and needed here alone

    found: list[Any] = [module for module in network.modules() if isinstance(module, PreTrainedModel)]
    if not found:
        raise ValueError(
            f"guide.weights={weights!r} is for a guide made of a model of transformers, and {type(network).__name__} "
            "holds none. Choose another guide.name, or weights of another kind."
        )
    inner = found[0]
    try:
        loaded, told = type(inner).from_pretrained(weights.removeprefix(TRANSFORMERS), output_loading_info=True)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise _unfetched(weights, error) from error
    absent = set(told["missing_keys"])  # by now made up at random
    _fill(inner, {name: value for name, value in loaded.state_dict().items() if name not in absent}, weights)


def _unfetched(weights: str, error: Exception) -> ValueError:
    why = " ".join(str(error).split())[:200]
    return ValueError(
        f"guide.weights={weights!r} could not be fetched or read ({why}). Check the name and the network, or fetch "
        "them on another machine and give their file."
    )
