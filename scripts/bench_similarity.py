"""Times linear CKA, loss and gradient, against the usual ways of computing it over ranks, alternately in one run.

    python scripts/bench_similarity.py                       the two sizes of the README, 4 processes
    python scripts/bench_similarity.py --sizes 1024,4096,512 --processes 1,2,4 --repeats 9

Each method is run once to warm up and then `--repeats` times, all methods in turn; the slowest rank of a turn counts,
the median over turns is shown, and ratios are medians of the ratios within a turn. Memory is the peak of resident
memory above what was there before, the largest over ranks; bytes are numel x itemsize handed to collectives by a rank.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from scale_guide import linear_cka
from scale_guide.statistics import LAYOUTS, Pair, count_bytes, make_plan, wires

libc = ctypes.CDLL(None)
MAX_MATRIX_BYTES = 2 * 10**9
Method = Callable[[Tensor, Tensor], Tensor]


def gram_cka(x: Tensor, y: Tensor) -> Tensor:
    """CKA of whole batches by centred Gram matrices, in ordinary autograd."""
    x, y = x - x.mean(0), y - y.mean(0)
    k, ell = x @ x.T, y @ y.T
    return (k * ell).sum() / (k.square().sum() * ell.square().sum()).sqrt()


def feature_cka(x: Tensor, y: Tensor) -> Tensor:
    """The same by covariances."""
    x, y = x - x.mean(0), y - y.mean(0)
    return (x.T @ y).square().sum() / ((x.T @ x).square().sum() * (y.T @ y).square().sum()).sqrt()


def hkh_cka(x: Tensor, y: Tensor) -> Tensor:
    """CKA as most research code writes it: tr(K H L H) with a centring matrix."""
    n = len(x)
    h = torch.eye(n) - 1 / n
    k, ell = h @ (x @ x.T) @ h, h @ (y @ y.T) @ h
    return (k * ell).sum() / (k.square().sum() * ell.square().sum()).sqrt()


def gather(x: Tensor) -> Tensor:
    """All ranks' rows, differentiably, by torch's own function."""
    if dist.get_world_size() == 1:
        return x
    wires._count(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and still what most code calls
        return torch.cat(all_gather(x.contiguous()))


def gather_without_gradient(x: Tensor) -> Tensor:
    """All ranks' rows with the own slice put back: the gradient is 1/W of the true one (PAPER.md section 4)."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    wires._count(x)
    dist.all_gather(parts, x.detach().contiguous())
    parts[dist.get_rank()] = x
    return torch.cat(parts)


def fits(name: str, size: tuple[int, int, int]) -> bool:
    """Whether a method's matrices fit (covariances of wide layers do not) and its flops too (H K H costs n^3)."""
    n, p, q = size
    elements = p * p + p * q + q * q if "covariance" in name else 2 * n * n
    return 4 * elements <= MAX_MATRIX_BYTES and not ("H K H" in name and n > 1024)


def methods() -> dict[str, Method]:
    """Every way that is timed, by the name it has in the table."""
    ours = {
        f"scale_guide {name}": lambda x, y, name=name: linear_cka(x, y, layout=name) for name in ("auto", *LAYOUTS)
    }
    return {
        **ours,
        "gather + autograd, Gram": lambda x, y: gram_cka(gather(x), gather(y)),
        "gather + autograd, covariance": lambda x, y: feature_cka(gather(x), gather(y)),
        "own slice put back, H K H (gradient 1/W)": lambda x, y: hkh_cka(
            gather_without_gradient(x), gather_without_gradient(y)
        ),
    }


def measure(method: Method, x: Tensor, y: Tensor) -> dict[str, float]:
    """Seconds, bytes handed to collectives and peak memory of one loss and gradient on this rank; and their values."""
    x = x.clone().requires_grad_()
    libc.malloc_trim(0)  # or what an earlier method freed would hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory
    before = _resident("VmRSS")
    dist.barrier()
    start = time.perf_counter()
    with count_bytes() as sent:
        value = method(x, y)
        value.backward()
    seconds = time.perf_counter() - start
    assert x.grad is not None, "x is a leaf"
    peak = max(_resident("VmHWM") - before, 0)
    return {
        "seconds": seconds,
        "bytes": sent.num_bytes,
        "memory": peak,
        "value": float(value.detach()),
        "gradient": float(x.grad.norm()),
    }


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _rank(
    rank: int,
    num_processes: int,
    rendezvous: str,
    size: tuple[int, int, int],
    chosen: list[str],
    repeats: int,
    out: Any,
) -> None:
    torch.set_num_threads(max(1, (mp.cpu_count() or 1) // num_processes))
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=num_processes)
    n, p, q = size
    generator = torch.Generator().manual_seed(rank)
    b = n // num_processes
    x = torch.randn(b, p, generator=generator)
    y = torch.randn(b, q, generator=generator) + x[:, :1]
    available = methods()
    turns: list[dict[str, dict[str, float]]] = []
    for turn in range(repeats + 1):
        result = {name: measure(available[name], x, y) for name in chosen}
        everyone: list[Any] = [None] * num_processes
        dist.all_gather_object(everyone, result)
        if turn and rank == 0:
            turns.append({name: _slowest([each[name] for each in everyone]) for name in chosen})
    if rank == 0:
        out.put(turns)
    dist.destroy_process_group()


def _slowest(ranks: list[dict[str, float]]) -> dict[str, float]:
    worst = {field: max(rank[field] for rank in ranks) for field in ranks[0]}
    worst["gradient"] = sum(rank["gradient"] ** 2 for rank in ranks) ** 0.5
    return worst


def run(size: tuple[int, int, int], num_processes: int, chosen: list[str], repeats: int) -> list[dict[str, Any]]:
    """Every turn's figures by method, from `num_processes` fresh gloo processes."""
    context = mp.get_context("spawn")
    out = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = (Path(folder) / "rendezvous").as_uri()
        mp.spawn(_rank, (num_processes, rendezvous, size, chosen, repeats, out), nprocs=num_processes)
    return out.get()  # type: ignore[no-any-return]


def show(size: tuple[int, int, int], num_processes: int, turns: list[dict[str, Any]]) -> None:
    """Prints one table: medians over the turns, ratios to `auto` within a turn."""
    n, p, q = size
    pair = Pair("x", "y")
    plan = make_plan([pair], {pair.nodes[0]: p, pair.nodes[1]: q}, n, num_processes, {"gram", "feature"})
    print(f"\nN={n:,}  p={p:,}  q={q:,}  W={num_processes}   auto takes {plan.parts[0].layout}")
    print(f"{'method':42} {'seconds':>9} {'x auto':>8} {'peak MB':>9} {'wire MB':>9} {'gradient':>10}")
    reference = "scale_guide auto"
    for name in turns[0]:

        def median(field: str, name: str = name) -> float:
            return statistics.median(turn[name][field] for turn in turns)

        ratio = statistics.median(turn[name]["seconds"] / turn[reference]["seconds"] for turn in turns)
        print(
            f"{name:42} {median('seconds'):9.4f} {ratio:8.2f} {median('memory') / 1e6:9.1f} "
            f"{median('bytes') / 1e6:9.2f} {median('gradient'):10.3e}"
        )


def main() -> None:
    """Reads the command line and prints a table for each size and number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["256,65536,65536", "4096,512,768"], help="N,p,q ...")
    parser.add_argument("--processes", default="4", help="numbers of processes, with commas")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--methods", default="", help="only methods whose name holds one of these, with commas")
    options = parser.parse_args()
    wanted = [word for word in options.methods.split(",") if word]
    chosen = [name for name in methods() if not wanted or name == "scale_guide auto" or any(w in name for w in wanted)]
    for text in options.sizes:
        size = tuple(int(number) for number in text.split(","))
        assert len(size) == 3, "argparse gives N,p,q"
        for num_processes in (int(number) for number in options.processes.split(",")):
            possible = [name for name in chosen if fits(name, size)]
            show(size, num_processes, run(size, num_processes, possible, options.repeats))


if __name__ == "__main__":
    main()
