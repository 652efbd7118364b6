"""Forward hooks that read the outputs of chosen layers, once registered and armed only inside `record()`."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from scale_guide.gradient_watch import GradientWatch


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
    """What a layer gave: its own tensor, that tensor's version then (-1: compiled code knows none), and ours."""

    original: Tensor
    version: int
    activation: Activation


class _Hook:
    """A forward hook that stays with its module: what is copied or unpickled in its place does nothing.

    An averaged copy (EMA) of the target would otherwise be recorded together with the target, or in its stead.
    """

    def __init__(self, action: Callable[[nn.Module, Any], None]) -> None:
        self._action = action

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self._action(module, output)

    def __reduce__(self) -> Any:
        return _Hook, (_nothing,)


def _nothing(module: nn.Module, output: Any) -> None:
    pass


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

    Attributes:
        watch: Measures the gradients that meet at these layers, while it is on; not in compiled code.
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
        self.watch = GradientWatch()
        self._layers = tuple(dict.fromkeys(layers))
        self._copied = None if overwritten is None else set(overwritten)
        self._usual: dict[str, int] = {}
        self._recording = self._expects_graph = False
        self._forget()
        modules = dict(model.named_modules())
        hooks = {modules[name]: _Hook(partial(self._see, name)) for name in self._layers}
        self._handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
        self._handles.append(model.register_forward_hook(_Hook(self._see_output)))

    @contextmanager
    def record(self) -> Iterator[None]:
        """Arms the hooks inside the `with` block; what was recorded before is dropped.

        Raises:
            ValueError: it is open already.
        """
        if self._recording:
            raise ValueError("guidance.record() was entered inside itself: leave the first block before the next.")
        self._forget()
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
            ValueError: a layer that did not run, or not as often as before, that returned no tensor, was overwritten
                after capture, or was captured without a graph.
        """
        fires, counts, outputs = self._fires, self._counts, self._outputs
        self._check_counts(counts, set(fires))
        self._forget()
        for name, fire in fires.items():
            self._check(name, fire, needs_graph and self._expects_graph)
            fire.activation.is_model_output = any(_is_same(fire.original, x) for out in outputs for x in _logits(out))
        # Compiled code does not say what it overwrites: there every layer goes on being copied.
        if self._copied is None and all(fire.version >= 0 for fire in fires.values()):
            self._copied = {name for name, fire in fires.items() if fire.activation.overwritten}
        self._usual = self._usual or counts
        return {name: fire.activation for name, fire in fires.items()}

    def close(self) -> None:
        """Removes every hook."""
        for handle in self._handles:
            handle.remove()

    def _forget(self) -> None:
        self._fires: dict[str, _Fire] = {}
        self._counts: dict[str, int] = {}
        self._outputs: list[Any] = []
        self._without_tensor: dict[str, str] = {}

    def _see(self, name: str, module: nn.Module, output: Any) -> None:
        if not self._recording or not _in_forward():
            return
        count = self._counts.get(name, 0) + 1
        self._counts[name] = count
        fire_name = name if count == 1 else f"{name}#{count}"
        if self.keep is not None and fire_name not in self.keep:
            return
        found = _find(output)
        if found is None:
            self._without_tensor[fire_name] = type(output).__name__
            return
        original = found.data if isinstance(found, PackedSequence) else found
        compiled = torch.compiler.is_compiling()
        kept = original.clone() if self._copied is None or fire_name in self._copied else original
        if self.watch.is_on and not compiled and original.requires_grad:
            kept = self.watch.branch(original, kept)
        activation = Activation(_batch_first(module, found, kept), _channels_first(module, kept))
        self._fires[fire_name] = _Fire(original, -1 if compiled else original._version, activation)

    def _see_output(self, module: nn.Module, output: Any) -> None:
        if self._recording and _in_forward():
            self._outputs.append(output)

    def _check_counts(self, counts: dict[str, int], fired: set[str]) -> None:
        for name, kind in self._without_tensor.items():
            raise ValueError(
                f"The layer {name!r} returned a {kind}, in which there is no tensor. Choose a layer that returns a "
                "tensor, or a tuple, dict or dataclass that holds one."
            )
        wanted = set(self._layers) if self.keep is None else {name.partition("#")[0] for name in self.keep}
        for name in sorted(wanted & counts.keys() & self._usual.keys()):
            now, before = counts[name], self._usual[name]
            if now != before:
                raise ValueError(
                    f"The layer {name!r} ran {_times(now)} in this forward pass, but {_times(before)} before, so that "
                    "its outputs cannot be told apart. Choose a layer that always runs equally often."
                )
        missing = sorted((wanted if self.keep is None else self.keep) - fired)
        if missing:
            raise ValueError(
                f"The layer {missing[0]!r} was chosen but did not run in this forward pass. Choose layers that always "
                "run, by names or globs, and call the model inside `guidance.record()`; if it is compiled, keep to "
                "the order prepare, Guidance, compile, for hooks that come later never fire."
            )

    def _check(self, name: str, fire: _Fire, needs_graph: bool) -> None:
        changed = fire.version >= 0 and fire.original._version != fire.version
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


def _times(count: int) -> str:
    return f"{count} time" if count == 1 else f"{count} times"


def means(wanted: str, fire: str) -> bool:
    """Returns whether a name or glob means a fire; without a # it means every fire of a layer."""
    name = fire if "#" in wanted else fire.partition("#")[0]
    return fnmatch.fnmatchcase(name, wanted) or name == wanted


def first_tensor(output: Any) -> Tensor | None:
    """Returns the tensor of a module's output: itself, or the first in a tuple, dict, ModelOutput, PackedSequence."""
    found = _find(output)
    return found.data if isinstance(found, PackedSequence) else found


def _find(output: Any) -> Tensor | PackedSequence | None:
    """Returns the first tensor or PackedSequence in an output, however deep it lies."""
    if output is None or isinstance(output, (Tensor, PackedSequence)):
        return output
    if hasattr(output, "values"):
        output = tuple(output.values())
    elif dataclasses.is_dataclass(output):
        output = tuple(getattr(output, field.name) for field in dataclasses.fields(output))
    if isinstance(output, (tuple, list)):
        return next((found for item in output if (found := _find(item)) is not None), None)
    return None


def _logits(output: Any) -> list[Tensor]:
    """Returns what a model's output holds of logits: `logits`, else every tensor of a dict, else the first tensor."""
    if not isinstance(output, Tensor) and hasattr(output, "values"):
        values = [output["logits"]] if "logits" in output else list(output.values())
        return [value for value in values if isinstance(value, Tensor)]
    first = first_tensor(output)
    return [] if first is None else [first]


def _is_same(original: Tensor, value: Tensor) -> bool:
    """Returns whether a model returned this output, perhaps as a new tensor of the same memory (ZeRO's hooks)."""
    if value is original or value.device.type == "meta":
        return value is original
    return value.shape == original.shape and value.data_ptr() == original.data_ptr()


def _batch_first(module: nn.Module, found: Tensor | PackedSequence, tensor: Tensor) -> Tensor:
    """Returns the output with the batch as axis 0: known from the module's type, never guessed from sizes."""
    if isinstance(found, PackedSequence):
        return pad_packed_sequence(found, batch_first=True)[0]
    attention = getattr(module, "self_attn", module)
    batch_first = getattr(attention, "batch_first", True)
    return tensor if batch_first or tensor.dim() < 3 else tensor.transpose(0, 1)


def _channels_first(module: nn.Module, tensor: Tensor) -> bool:
    convolution = isinstance(module, (nn.modules.conv._ConvNd, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d))
    return tensor.dim() >= 3 and (convolution or tensor.dim() >= 4)
