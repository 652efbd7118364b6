"""The one Accelerator of a process: single process, DDP and ZeRO 0-3 behind one small interface.

Everything that differs between the engines is in this file: which backend carries the messages, who synchronises
gradients when, who clips, how a state is written and read. The rest of the package knows none of it.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from scale_guide import engine_state
from scale_guide.finite_gradients import gradients_are_finite, guard_plain_step
from scale_guide.launch import check_engine, check_gpus, check_trackers, deepspeed_config, wants_deepspeed
from scale_guide.running_statistics import averaged


class Engine:
    """Wraps the Accelerator; made once per process and used again for every variant (`free` between them)."""

    def __init__(self, *, timeout_s: int = 1800, trackers: Sequence[str] = (), logging_dir: str | None = None) -> None:
        """Joins the other processes of the launch.

        Args:
            timeout_s: Seconds after which a process gives up waiting for the others.
            trackers: Experiment trackers known to Accelerate.
            logging_dir: Where trackers that write files put them.

        Raises:
            ValueError: a launch that this package does not run under.
        """
        check_trackers(trackers)
        deepspeed, gpu = wants_deepspeed(), check_gpus()
        if not gpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns, on every rank, that it found none
        # Without a GPU: Accelerator(cpu=True) silently drops DeepSpeed, and DeepSpeed without a named backend makes
        # Accelerate believe in a single process.
        backend = {"backend": "gloo"} if deepspeed and not gpu else {}
        self.accelerator = Accelerator(
            cpu=not gpu and not deepspeed,
            log_with=list(trackers) or None,
            project_dir=logging_dir,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s), **backend),
                # Each rank keeps its own BatchNorm statistics, as under DeepSpeed; averaged_buffers() joins them.
                DistributedDataParallelKwargs(broadcast_buffers=False),
            ],
        )
        check_engine(self.accelerator)
        self.deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        plugin = self.accelerator.state.deepspeed_plugin
        self._config: dict[str, Any] = plugin.deepspeed_config if self.deepspeed else {}
        self._launch_config = copy.deepcopy(self._config)
        self._clip_norm = 0.0
        self._skipped = False
        self._model: Any = None
        self._optimizer: Any = None

    @property
    def rank(self) -> int:
        """Index of this process, 0 .. world_size - 1."""
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        """W, the number of processes over which the engine averages gradients."""
        return int(self.accelerator.num_processes)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return torch.device(self.accelerator.device)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run folder."""
        return bool(self.accelerator.is_main_process)

    @property
    def name(self) -> str:
        """Returns single | DDP | ZeRO-0 .. ZeRO-3: what a checkpoint's format depends on."""
        if self.deepspeed:
            return f"ZeRO-{self._launch_config['zero_optimization']['stage']}"
        return "single" if self.accelerator.distributed_type == DistributedType.NO else "DDP"

    # Preparing

    def build(self, make: Callable[[], nn.Module]) -> nn.Module:
        """Returns make(), under ZeRO-3 sharded from the start: only rank 0 ever holds all of it. Collective."""
        if self.name != "ZeRO-3":
            return make()
        from scale_guide.sharding import build_sharded  # imports DeepSpeed, which takes seconds

        return build_sharded(make, self._launch_config, rank=self.rank, world_size=self.world_size, device=self.device)

    def prepare(
        self, target: nn.Module, optimizer: torch.optim.Optimizer, *, micro_batch_size: int, clip_norm: float = 0.0
    ) -> nn.Module:
        """Returns the target as the engine runs it; the optimizer is kept inside.

        Args:
            target: The network to train, on the CPU.
            optimizer: Its optimizer. The schedule is not the engine's: see `set_learning_rate`.
            micro_batch_size: Rows per process and forward pass.
            clip_norm: Largest norm of the whole gradient; 0 never clips.

        Raises:
            ValueError: the DeepSpeed file asks for a clipping, accumulation or batch size other than the recipe's.
        """
        self._clip_norm = clip_norm
        if self.deepspeed:
            config = deepspeed_config(
                self._launch_config,
                micro_batch_size=micro_batch_size,
                world_size=self.world_size,
                clip_norm=clip_norm,
            )
            self._config.clear()
            self._config.update(config)
        with warnings.catch_warnings():
            # Its successor also takes the buffers from rank 0 at the start; torch <= 2.12 does not know it.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            self._model, self._optimizer = self.accelerator.prepare(target, optimizer)
        # DeepSpeed in bf16 or fp16 casts parameters only, and a BatchNorm of two number formats cannot run.
        for layer in self._model.modules() if self.deepspeed else ():
            if isinstance(layer, _NormBase) and layer.weight is not None:
                layer.to(layer.weight.dtype)
        if self.name == "ZeRO-0" and not self.has_loss_scale:
            guard_plain_step(self._model, lambda: setattr(self, "_skipped", True))
        self._model.train()
        return self._model  # type: ignore[no-any-return]

    def free(self) -> None:
        """Lets go of the model and the optimizer, so that the next variant can be prepared."""
        self._model = self._optimizer = None
        self.accelerator.free_memory()

    def unwrap(self, model: nn.Module) -> nn.Module:
        """Returns the bare module inside a prepared one: the one to register hooks on."""
        return self.accelerator.unwrap_model(model)  # type: ignore[no-any-return]

    def building_whole(self) -> contextlib.AbstractContextManager[Any]:
        """While inside, ZeRO-3 does not shard networks as they are built (the guide must stay whole)."""
        if not self.deepspeed:
            return contextlib.nullcontext()
        return self.accelerator.state.deepspeed_plugin.zero3_init_context_manager(enable=False)  # type: ignore[no-any-return]

    # A step

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the batch on this process's device."""
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def forward(self, model: nn.Module, x: Tensor) -> Any:
        """Returns model(x), x being cast to the target's number format (DeepSpeed in bf16 casts no inputs itself)."""
        if x.is_floating_point():
            dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), x.dtype)
            x = x.to(dtype)
        return model(x)

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch of a step: gradients cross the ranks at the last alone."""
        self.accelerator.sync_gradients, self._skipped = last, False
        # DeepSpeed keeps its own account (no_sync is an error under ZeRO-2 and -3).
        quiet = not last and not self.deepspeed and self.world_size > 1
        with self._model.no_sync() if quiet else contextlib.nullcontext():
            yield
        self.accelerator.sync_gradients = True

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss`; inside `micro_batch`. DeepSpeed also clips and updates at the last one."""
        self.accelerator.backward(loss)

    def step(self) -> None:
        """Clips, updates the parameters and clears the gradients (DeepSpeed has done all three in `backward`).

        A gradient that is not a number, which after the engine's mean is so on every rank, updates nothing.
        """
        if self.deepspeed:
            return
        if self._clip_norm > 0:
            finite = bool(self.accelerator.clip_grad_norm_(self._model.parameters(), self._clip_norm).isfinite())
        else:
            finite = gradients_are_finite(self._model)
        # With a loss scale the scaler judges: it may be lowered.
        self._skipped = not (finite or self.has_loss_scale)
        if not self._skipped:
            self._optimizer.step()
        self._optimizer.zero_grad()

    @property
    def has_loss_scale(self) -> bool:
        """Whether gradients are scaled, as fp16 needs, and overflows therefore a part of ordinary training."""
        return self._model.fp16_enabled() if self.deepspeed else self.accelerator.scaler is not None

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last update was dropped because gradients were not finite. Alike on every rank."""
        return self._skipped or bool(self.accelerator.optimizer_step_was_skipped)

    def set_learning_rate(self, value: float) -> None:
        """Sets the learning rate of the next update (Accelerate's schedulers would step once per process)."""
        for group in self._optimizer.param_groups:
            group["lr"] = value

    def reset_optimizer(self) -> None:
        """Forgets the optimizer's moments and step counts: the next update is as a first one."""
        for state in self._optimizer.state.values():
            for name, value in state.items():
                if value is not None:  # the momentum of plain SGD
                    state[name] = value.zero_() if isinstance(value, Tensor) else 0

    # Between ranks

    def sum(self, tensor: Tensor) -> Tensor:
        """Returns the sum over ranks, in float64 on the engine's device. Collective."""
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        total: Tensor = self.accelerator.reduce(tensor.detach().to(self.device, wide), reduction="sum")
        return total

    def barrier(self) -> None:
        """Waits for every rank. Collective."""
        self.accelerator.wait_for_everyone()

    def gather_list(self, items: list[Any]) -> list[Any]:
        """Returns the lists of every rank, joined. Collective."""
        return list(gather_object(items))

    def averaged_buffers(self, model: nn.Module | None = None) -> contextlib.AbstractContextManager[None]:
        """While inside, running statistics are their mean over ranks; after it each rank's own again. Collective."""
        return averaged(self.unwrap(model or self._model), self.sum, self.world_size)

    # State

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the target's weights on the CPU, no two sharing memory; empty off the main rank. Collective."""
        with self.averaged_buffers():
            state = self.accelerator.get_state_dict(self._model)
            if not self.is_main:
                return {}
            return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}

    def save_state(self, folder: Path) -> str:
        """Writes target and optimizer into `folder`; returns "" or why this rank could not. Collective."""
        with self.averaged_buffers():
            problem = engine_state.save_state(self.accelerator, self._model, folder, deepspeed=self.deepspeed)
        return problem or engine_state.save_own(self.unwrap(self._model), folder, self.rank)

    def load_state(self, folder: Path, *, num_processes: int, scratch: Path) -> None:
        """Reads what `save_state` wrote on `num_processes` processes. Collective.

        Args:
            folder: What it wrote.
            num_processes: How many there were. Of other numbers ZeRO makes another copy first.
            scratch: Folder for that copy; removed in the end.

        Raises:
            OSError: no room for the copy.
        """
        if num_processes == self.world_size or not self.deepspeed or self.name == "ZeRO-0":
            self.accelerator.load_state(str(folder))
        else:
            if self.is_main:
                engine_state.make_universal(folder, scratch)
            self.barrier()
            engine_state.load_universal(self._model, scratch)
            self.barrier()
            shutil.rmtree(scratch, ignore_errors=True)
        if num_processes == self.world_size:
            engine_state.load_own(self.unwrap(self._model), folder, self.rank)

    def close(self) -> None:
        """Leaves the process group."""
        self.free()
        gc.collect()
        self.accelerator.state.destroy_process_group()
        # gloo's threads let go of their last tensors a little later; Python gone by then is an abort (SIGABRT).
        time.sleep(0.2)
