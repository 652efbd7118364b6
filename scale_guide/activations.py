"""Forward hooks that read the outputs of chosen layers, once registered and armed only inside `record()`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence


@dataclass
class Activation:
    """One fire of one layer.

    Attributes:
        output: Batch first: [B, ...].
        channels_first: The features are axis 1 (convolutions and what follows them).
        is_model_output: The model returned this very tensor: these are the logits.
        overwritten: A later in-place module changed the layer's own output (ours is a copy).
    """

    output: Tensor
    channels_first: bool
    is_model_output: bool = False
    overwritten: bool = False


@dataclass
class _Fire:
    original: Tensor
    version: int
    activation: Activation


class Recorder:
    """Reads the outputs of `layers` of `model` while it runs inside `record()`.

    Register it after `accelerator.prepare` (ZeRO-3 wraps module outputs in hooks of its own) and before the first
    forward pass (torch.compile ignores later hooks).

    Args:
        model: Any module.
        layers: Names of its submodules.
        keep: Fires to keep, by name; None keeps all. A layer that fires several times gives `name`, `name#2`, ...
        overwritten: Layers whose output an in-place module overwrites, to be copied at capture. None: not known yet,
            so the first pass copies every layer and finds out.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        *,
        keep: Sequence[str] | None = None,
        overwritten: Sequence[str] | None = None,
    ) -> None:
        self.keep = None if keep is None else set(keep)
        self._layers = tuple(layers)
        self._copied = None if overwritten is None else set(overwritten)
        self._fires: dict[str, _Fire] = {}
        self._recording = self._expects_graph = False
        modules = dict(model.named_modules())
        self._handles = [modules[name].register_forward_hook(self._hook(name)) for name in dict.fromkeys(layers)]
        self._handles.append(model.register_forward_hook(self._mark_logits))

    @contextmanager
    def record(self) -> Iterator[None]:
        """Arms the hooks inside the `with` block; what was recorded before is dropped."""
        self._fires = {}
        self._recording, self._expects_graph = True, torch.is_grad_enabled()
        try:
            yield
        finally:
            self._recording = False

    def take(self, *, needs_graph: bool = False) -> dict[str, Activation]:
        """Returns what was recorded, in execution order, and forgets it.

        Args:
            needs_graph: Whether gradient must flow through the outputs (the target's).

        Raises:
            ValueError: a layer that did not run, was overwritten after capture, or was captured without a graph.
        """
        fires, self._fires = self._fires, {}
        fired = {name.partition("#")[0] for name in fires}
        if self.keep is None:
            missing = [name for name in self._layers if name not in fired]
        else:
            missing = sorted(self.keep - fires.keys())
        if missing:
            raise ValueError(
                f"The layer {missing[0]!r} was chosen but did not run in this forward pass. Choose a layer that "
                "always runs (`scale-guide layers` lists them), and call the model inside `guidance.record()`."
            )
        for name, fire in fires.items():
            self._check(name, fire, needs_graph and self._expects_graph)
        if self._copied is None:
            self._copied = {name for name, fire in fires.items() if fire.activation.overwritten}
        return {name: fire.activation for name, fire in fires.items()}

    def close(self) -> None:
        """Removes every hook."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not self._recording or not _in_forward():
                return
            fire_name, count = name, 1
            while fire_name in self._fires:
                count += 1
                fire_name = f"{name}#{count}"
            if self.keep is not None and fire_name not in self.keep:
                return
            original = first_tensor(output)
            if original is None:
                return
            kept = original.clone() if self._copied is None or fire_name in self._copied else original
            version = 0 if torch.compiler.is_compiling() else original._version
            activation = Activation(_batch_first(module, output, kept), _channels_first(module, kept))
            self._fires[fire_name] = _Fire(original, version, activation)

        return hook

    def _mark_logits(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._recording and self._fires and _in_forward():
            values = [output] if isinstance(output, Tensor) else list(getattr(output, "values", lambda: ())())
            for fire in self._fires.values():
                fire.activation.is_model_output = any(value is fire.original for value in values)

    def _check(self, name: str, fire: _Fire, needs_graph: bool) -> None:
        changed = not torch.compiler.is_compiling() and fire.original._version != fire.version
        if changed and self._copied is not None and name not in self._copied:
            raise ValueError(
                f"The output of layer {name!r} was overwritten in place after it was recorded, which it was not at "
                "first. Set inplace=False on the module that follows it."
            )
        fire.activation.overwritten = changed
        if needs_graph and not fire.activation.output.requires_grad:
            raise ValueError(
                f"The output of target layer {name!r} carries no gradient, so it cannot be guided. If the target uses "
                "activation checkpointing, pass use_reentrant=False; if the layer and all before it are frozen, "
                "choose a later layer."
            )


def _in_forward() -> bool:
    """False while backward recomputes a forward pass (activation checkpointing): that fire was seen already."""
    return torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1


def first_tensor(output: Any) -> Tensor | None:
    """Returns the tensor of a module's output: itself, or the first of a tuple, ModelOutput or PackedSequence."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, PackedSequence):
        return output.data
    if hasattr(output, "values"):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        return next((found for item in output if (found := first_tensor(item)) is not None), None)
    return None


def _batch_first(module: nn.Module, output: Any, tensor: Tensor) -> Tensor:
    """Returns the output with the batch as axis 0: known from the module's type, never guessed from sizes."""
    if isinstance(output, tuple) and isinstance(output[0], PackedSequence):
        output = output[0]
    if isinstance(output, PackedSequence):
        return pad_packed_sequence(output, batch_first=True)[0]
    attention = getattr(module, "self_attn", module)
    batch_first = getattr(attention, "batch_first", True)
    return tensor if batch_first or tensor.dim() < 3 else tensor.transpose(0, 1)


def _channels_first(module: nn.Module, tensor: Tensor) -> bool:
    convolution = isinstance(module, (nn.modules.conv._ConvNd, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d))
    return tensor.dim() >= 3 and (convolution or tensor.dim() >= 4)
