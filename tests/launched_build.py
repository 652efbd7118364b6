"""Runs inside `accelerate launch` (see test_sharding.py): builds networks under ZeRO-3 and writes what each rank saw.

Usage: accelerate launch --config_file ... tests/launched_build.py OUT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn
from torchvision.models import resnet18

from scale_guide.engine import Engine
from scale_guide.models import deep_fcn, plain_resnet, rnn, transformer, transformer_encoder

OUT = Path(sys.argv[1])
MODELS: dict[str, Callable[[], nn.Module]] = {
    "deep_fcn": partial(deep_fcn.build, num_classes=3, input_shape=(3, 8, 8), depth=3, first_width=16, width=8),
    "plain_resnet": partial(plain_resnet.build, num_classes=3, width_per_group=8),
    "resnet18": partial(resnet18, num_classes=3),
    "rnn": partial(rnn.build, vocab_size=11, embedding=8, hidden=16),
    "transformer": partial(transformer.build, vocab_size=11, max_length=8, width=16, heads=4, feedforward=16),
    "transformer_encoder": partial(
        transformer_encoder.build,
        vocab_size=11,
        num_classes=3,
        padding_id=0,
        max_length=8,
        width=16,
        heads=4,
    ),
}


class Tied(nn.Module):
    """Two layers that share a weight, and a buffer that torch draws."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("drawn", torch.randn(5))


def peak() -> int:
    """Returns the largest resident memory of this process so far, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def built(engine: Engine, make: Callable[[], nn.Module]) -> dict[str, Any]:
    """Returns how a network built under ZeRO-3 differs from the same one built whole."""
    torch.manual_seed(0)
    whole = make()
    torch.manual_seed(0)
    network = engine.build(make)
    values = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            values[name] = parameter.detach().cpu().clone()
    values |= dict(network.named_buffers())
    expected = dict(whole.named_parameters(remove_duplicate=False)) | dict(whole.named_buffers())
    return {
        "differ": [name for name, value in expected.items() if not torch.equal(values[name].cpu(), value)],
        "left_whole": sum(p.numel() for p in network.parameters()),
        "share": sum(p.ds_tensor.numel() for p in network.parameters()),
        "numel": sum(p.numel() for p in whole.parameters()),
        "num_tensors": [len(list(network.parameters())), len(list(whole.parameters()))],
    }


def main() -> None:
    """Writes OUT/RANK.json."""
    engine = Engine(timeout_s=300)
    seen = {name: built(engine, make) for name, make in {**MODELS, "tied": Tied}.items()}
    before = peak()
    # 50 layers of 4 MiB each.
    engine.build(lambda: nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(50))))
    seen["large"] = {"rise": peak() - before}
    (OUT / f"{engine.rank}.json").write_text(json.dumps(seen))
    engine.close()


if __name__ == "__main__":
    main()
