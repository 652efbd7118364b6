"""What the benchmarks share: fresh gloo processes, their resident memory, and on what machine it was. Linux only."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import queue
import tempfile
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from scale_guide.statistics import wires

libc = ctypes.CDLL(None)
Put = Callable[[Any], None]


def machine() -> str:
    """Returns a line for a report: processor, cores, torch, the day."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    return f"{processor}, {os.cpu_count()} cores, torch {torch.__version__}, gloo, {date.today().isoformat()}"


def resident(field: str) -> int:
    """Returns bytes of this process: VmRSS resident now, VmHWM resident at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def give_back_memory() -> None:
    """Gives what was freed back to the system."""
    gc.collect()
    libc.malloc_trim(0)


def watch_memory(device: str = "cpu") -> Callable[[], int]:
    """Returns a function that gives the bytes by which this process's memory has risen at most since this call."""
    if device != "cpu":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        return lambda: int(torch.cuda.max_memory_allocated()) - held
    give_back_memory()  # or what was freed earlier would hide what comes
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory
    before = resident("VmRSS")
    return lambda: max(resident("VmHWM") - before, 0)


def keep_no_freed_memory() -> None:
    """Has this process give freed tensors (of 8 KB or more) back at once, so that its peak is that of live ones."""
    m_mmap_threshold = -3
    libc.mallopt(m_mmap_threshold, 2**13)


def in_processes(worker: Callable[..., None], num_processes: int, *arguments: Any) -> Iterator[Any]:
    """Yields what rank 0 puts, as it comes, while `worker(put, *arguments)` runs on each of fresh gloo processes."""
    os.environ["TQDM_DISABLE"] = "1"  # for the ranks: one of the peers draws a bar at every call
    context = mp.get_context("spawn")
    out = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = (Path(folder) / "rendezvous").as_uri()
        given = (worker, num_processes, rendezvous, out, arguments)
        ranks = mp.spawn(_rank, given, nprocs=num_processes, join=False)  # type: ignore[no-untyped-call]
        running = True
        while running:
            # Asked first: what a rank put before it ended is in the queue by then.
            running = not ranks.join(timeout=0.05)
            try:
                while True:
                    yield out.get(timeout=0.05)
            except queue.Empty:
                continue


def _rank(
    rank: int, worker: Callable[..., None], num_processes: int, rendezvous: str, out: Any, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_processes))
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=num_processes)
    worker(out.put if rank == 0 else lambda _: None, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def agreed(value: Any) -> Any:
    """Returns rank 0's value on every rank. Collective."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def from_all(value: Any) -> list[Any]:
    """Returns every rank's value, by rank. Collective."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def gather(x: Tensor) -> Tensor:
    """Returns all ranks' rows, differentiably, by torch's own function. Collective, in backward too."""
    if dist.get_world_size() == 1:
        return x
    wires._count(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and still what most code calls
        return torch.cat(all_gather(x.contiguous()))


def gather_without_gradient(x: Tensor) -> Tensor:
    """Returns all ranks' rows, the own ones put back: the gradient is 1/W of the true one (PAPER.md section 4)."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    wires._count(x)
    dist.all_gather(parts, x.detach().contiguous())
    parts[dist.get_rank()] = x
    return torch.cat(parts)
