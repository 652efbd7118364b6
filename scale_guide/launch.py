"""What a launch file says, checked against the machine and the recipe before anything is prepared."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedType

from scale_guide.lookup import unknown

ENGINES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.DEEPSPEED)


def wants_deepspeed() -> bool:
    """Returns whether the launch file asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def check_gpus() -> bool:
    """Returns whether there is a GPU to use.

    Raises:
        ValueError: more processes on this machine than GPUs.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise ValueError(
            f"num_processes={processes} on this machine, which has {torch.cuda.device_count()} GPU(s): each process "
            "needs its own. Pass --num_processes, or launch with accelerate_configs/cpu.yaml."
        )
    return torch.cuda.is_available()


def check_trackers(names: Sequence[str]) -> None:
    """Checks that every tracker is known and installed: Accelerate leaves out a missing one without a word.

    Raises:
        ValueError: it is not.
    """
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise unknown("trackers", name, LOGGER_TYPE_TO_CLASS)
    missing = sorted(set(names) - {str(tracker) for tracker in get_available_trackers()})
    if missing:
        raise ValueError(
            f"trackers={missing[0]!r} is known but not installed. `pip install {missing[0]}`, or leave it out."
        )


def check_engine(accelerator: Accelerator) -> None:
    """Checks that this package runs under the engine that was launched.

    Raises:
        ValueError: it does not.
    """
    if accelerator.distributed_type not in ENGINES:
        raise ValueError(
            f"distributed_type={accelerator.distributed_type.value} in the launch file is not supported. "
            "Use a file of accelerate_configs/: cpu, ddp, zero1, zero2, zero3, zero3_offload or multinode_zero3."
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps={accelerator.gradient_accumulation_steps} in the launch file must be 1: "
            "the number of micro-batches follows from training.batch_size and training.micro_batch_size."
        )


def deepspeed_config(
    launched: Mapping[str, Any], *, micro_batch_size: int, world_size: int, clip_norm: float
) -> dict[str, Any]:
    """Returns the DeepSpeed configuration of one run: the launch file's, with what the recipe decides filled in.

    Args:
        launched: The launch file's JSON; 0.0 for clipping and "auto" for sizes leave them to the recipe.
        micro_batch_size: Rows per process and forward pass.
        world_size: Number of processes.
        clip_norm: Largest norm of the whole gradient; 0 never clips (DeepSpeed's own default would be 1.0).

    Raises:
        ValueError: the file decides otherwise than the recipe.
    """
    config = copy.deepcopy(dict(launched))
    wanted: dict[str, tuple[float, str]] = {
        "gradient_clipping": (clip_norm, "optimizer.clip_norm"),
        # Accumulation is ours: DeepSpeed sees one boundary per step.
        "gradient_accumulation_steps": (1, "see training.micro_batch_size"),
        "train_micro_batch_size_per_gpu": (micro_batch_size, "training.micro_batch_size"),
        "train_batch_size": (micro_batch_size * world_size, "training.batch_size"),
    }
    for key, (value, source) in wanted.items():
        found = config.get(key, "auto")
        is_open = found == "auto" or (key == "gradient_clipping" and found == 0)
        if not is_open and found != value:
            raise ValueError(
                f"{key}={found} in the DeepSpeed file differs from the recipe's {value} ({source}). "
                'Write 0.0 for gradient_clipping, 1 for gradient_accumulation_steps, and leave the sizes to "auto".'
            )
        config[key] = value
    if config["zero_optimization"]["stage"] == 3:
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return config


def check_compile(engine: str, device: torch.device) -> None:
    """Checks that torch.compile can do something for the target.

    Raises:
        ValueError: it cannot.
    """
    if engine == "ZeRO-3":
        raise ValueError(
            "training.compile=true does not go with ZeRO-3, whose hooks fetch the weights of each layer and so cut "
            "the compiled code at every one. Set it to false, or launch with accelerate_configs/zero2.yaml."
        )
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(
            f"training.compile=true needs a C++ compiler on the CPU, and there is no {compiler!r}. Install one, name "
            "one in the environment variable CXX, or set training.compile to false."
        )
