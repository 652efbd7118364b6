"""The frozen guide: no gradient, no optimizer, no checkpoint, its own number format, the same weights in every run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

Dtype = Literal["auto", "fp16", "bf16", "fp32"]
BatchNormMode = Literal["eval", "batch", "calibrate"]
DTYPES: dict[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Guide(nn.Module):
    """A frozen network. Keep it out of `accelerator.prepare`, and build it outside any ZeRO-3 context.

    Args:
        model: The network, on any device; it is moved and cast.
        dtype: auto is fp16 on a GPU, fp32 on a CPU.
        batch_norm: eval: stored statistics (the identity for an untrained guide, as the authors released it). batch:
            each batch's own. calibrate: measured once, by `calibrate`, and then kept.
        device: Where it runs.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: Dtype = "auto",
        batch_norm: BatchNormMode = "eval",
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        device = torch.device(device)
        self._fingerprint = fingerprint(model)
        self.dtype = torch.float16 if device.type != "cpu" else torch.float32
        if dtype != "auto":
            self.dtype = DTYPES[dtype]
        floating = {p.dtype for p in model.parameters() if p.is_floating_point()}
        if dtype == "auto" and floating == {torch.float64}:
            self.dtype = torch.float64
        self.device = device
        self.model = model.to(device=device, dtype=self.dtype).requires_grad_(False)
        self._batch_norm, self._calibrated = batch_norm, False
        self.train(False)

    def train(self, mode: bool = True) -> Guide:
        """Stays in evaluation mode whatever `mode` says; returns itself."""
        super().train(False)
        for norm in self._batch_norms() if self._batch_norm == "batch" else ():
            norm.train()
            norm.track_running_stats = False
        return self

    @torch.no_grad()
    def forward(self, inputs: Any) -> Any:
        """Returns the model's output for inputs [B, ...], without gradient, in the guide's dtype and on its device.

        Raises:
            ValueError: batch_norm="calibrate" and `calibrate` was not called.
        """
        if self._batch_norm == "calibrate" and not self._calibrated:
            raise ValueError(
                "guide.batch_norm='calibrate' measures its statistics once: call guide.calibrate(inputs) first, with "
                "the same inputs on every rank."
            )
        with torch.autocast(self.device.type, enabled=False):
            return self.model(self._cast(inputs))

    @torch.no_grad()
    def calibrate(self, inputs: Any) -> None:
        """Sets every BatchNorm's statistics to those of `inputs` [B, ...], which must be alike on every rank."""
        with _measuring(self._batch_norms()), torch.autocast(self.device.type, enabled=False):
            self.model(self._cast(inputs))
        self._calibrated = True

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the weights as they were given, before casting."""
        return self._fingerprint

    def check_finite(self, activations: Mapping[str, Tensor]) -> str | None:
        """Returns the first layer whose activations hold inf or NaN, or None."""
        return next((name for name, value in activations.items() if not bool(value.isfinite().all())), None)

    def overflow(self, layer: str) -> ValueError:
        """Returns the error for a layer whose activations are not finite: it names the way out."""
        name = next((name for name, dtype in DTYPES.items() if dtype == self.dtype), "fp64")
        way_out = (
            "bf16, which reaches as far as fp32" if name == "fp16" else "another initialisation or batch_norm: batch"
        )
        return ValueError(
            f"guide.dtype={name}: the activations of guide layer {layer!r} hold inf or NaN. Use {way_out}."
        )

    def _cast(self, inputs: Any) -> Any:
        if isinstance(inputs, Mapping):
            return {name: self._cast(value) for name, value in inputs.items()}
        if not isinstance(inputs, Tensor):
            return inputs
        return inputs.to(self.device, self.dtype if inputs.is_floating_point() else None)

    def _batch_norms(self) -> list[nn.modules.batchnorm._BatchNorm]:
        return [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def fingerprint(model: nn.Module) -> str:
    """Returns the SHA-256 of a model's parameters and buffers, names included."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _measuring(norms: list[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = 1.0
        norm.train()
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.eval()
