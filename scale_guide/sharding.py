"""A network under ZeRO-3 from the start: whole on rank 0 alone, and there only until its layers are handed out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from torch import Tensor, nn


def build_sharded(
    make: Callable[[], nn.Module], config: Mapping[str, Any], *, rank: int, world_size: int, device: torch.device
) -> nn.Module:
    """Returns make() with its parameters sharded over the ranks; the values are those of rank 0.

    Collective: call on every rank. Rank 0 builds the network, the others its outline on meta tensors; then layer after
    layer is sent to all and cut. So a rank other than 0 never holds more than one layer beside its own share.

    Building inside `deepspeed.zero.Init`, the usual way, shards each layer as its constructor ends. What a network
    does to its layers after that then happens to empty tensors, without a word: torchvision's ResNets and the models
    of transformers would start from other values than without ZeRO-3.

    Args:
        make: Builds the network on the current device; what it builds on meta tensors has the same modules.
        config: DeepSpeed's.
        rank: Of this process.
        world_size: Number of processes.
        device: Where this process computes.
    """
    sizes = {"train_micro_batch_size_per_gpu": 1, "train_batch_size": world_size, "gradient_accumulation_steps": 1}
    complete = {**config, **sizes}  # zero.Init checks that there are sizes, and does nothing with them
    with contextlib.nullcontext() if rank == 0 else torch.device("meta"):
        network = make()
    dtype = next((kind for name, kind in _PRECISIONS.items() if config.get(name, {}).get("enabled") is True), None)
    made: dict[Tensor, Tensor] = {}
    swapper = None
    # Inner modules first: zero.Init takes all that is inside the module it is given.
    for module in reversed(list(network.modules())):
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if tensor not in made:  # a tensor that several modules share stays shared
                    made[tensor] = _real(tensor, dtype)
                table[name] = made[tensor]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
                comm.broadcast(module._buffers[name], 0)
        swapper = deepspeed.zero.Init(module=module, config_dict_or_path=complete, param_swapper=swapper).param_swapper
    return network


_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _real(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Returns the tensor, a parameter cast to `dtype`, or one of its kind on the host if it is on meta."""
    if not isinstance(tensor, nn.Parameter):
        return torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor
    kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    if tensor.is_meta:
        return nn.Parameter(torch.empty_like(tensor, device="cpu", dtype=kind), tensor.requires_grad)
    tensor.data = tensor.data.to(kind)  # the same object, so that nothing else keeps the whole of it
    return tensor
