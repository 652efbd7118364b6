"""The state of target and optimizer as an engine writes it, to be read on as many processes, or on others."""

from __future__ import annotations

import argparse
import contextlib
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from scale_guide.disk import note, write_errors_noted
from scale_guide.running_statistics import running_statistics

TAG = "pytorch_model"
"""What Accelerate calls the folder of DeepSpeed's files."""


def save_state(accelerator: Any, model: Any, folder: Path, *, deepspeed: bool) -> str:
    """Writes a state into `folder`; returns "" or why this rank could not. Collective.

    A full disk must not raise on one rank inside DeepSpeed's save: the others would wait for it for ever.
    """
    problems: list[str] = []
    with contextlib.ExitStack() as guards:
        if deepspeed:
            writer = model.checkpoint_engine
            for owner, call in ((writer, "save"), (writer, "makedirs"), (model, "_copy_recovery_script")):
                guards.enter_context(write_errors_noted(owner, call, problems))
        try:
            accelerator.save_state(str(folder), save_latest=False)
        except (OSError, RuntimeError, SafetensorError) as error:
            note(error, problems)
    return problems[0] if problems else ""


def save_own(model: nn.Module, folder: Path, rank: int) -> str:
    """Writes what this rank alone has, the running statistics of its rows; returns "" or why it could not."""
    problems: list[str] = []
    own = {name: buffer.contiguous() for name, buffer in running_statistics(model).items()}
    try:
        if own:
            save_file(own, _own(folder, rank))
    except (OSError, SafetensorError) as error:
        note(error, problems)
    return problems[0] if problems else ""


def load_own(model: nn.Module, folder: Path, rank: int) -> None:
    """Reads what `save_own` wrote on as many processes."""
    for name, buffer in running_statistics(model).items():
        buffer.copy_(load_file(_own(folder, rank))[name])


def _own(folder: Path, rank: int) -> Path:
    return folder / f"running_statistics_{rank}.safetensors"


def make_universal(folder: Path, scratch: Path) -> None:
    """Turns the files of ZeRO-1, -2 or -3 in `folder` into DeepSpeed's universal format, in scratch/TAG.

    Raises:
        OSError: they cannot be written.
    """
    from deepspeed.checkpoint.ds_to_universal import main  # imports DeepSpeed, which takes seconds

    shutil.rmtree(scratch, ignore_errors=True)
    folders = {"input_folder": str(folder / TAG), "output_folder": str(scratch / TAG)}
    workers = {"num_extract_workers": 1, "num_merge_workers": 1}
    # Our models are not Megatron's, whose facts it would ask for.
    main(argparse.Namespace(**folders, **workers, keep_temp_folder=False, strict=True, inject_missing_state=True))


def load_universal(model: Any, scratch: Path) -> None:
    """Reads what `make_universal` wrote into a DeepSpeed engine. Collective."""
    model._config.load_universal_checkpoint = True
    try:
        model.load_checkpoint(str(scratch), tag=TAG)
    finally:
        model._config.load_universal_checkpoint = False
