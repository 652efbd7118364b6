"""Times linear CKA, loss and gradient, against the usual ways of computing it over ranks, alternately in one run.

    python scripts/bench_similarity.py                       the two sizes of the README, 4 processes
    python scripts/bench_similarity.py --sizes 1024,4096,512 --processes 1,2,4 --repeats 9
    python scripts/bench_similarity.py --grid --table --json grid.json      all sizes, 1, 2 and 4 processes; hours

At each point every method is run once on eight rows per rank and once in full, uncounted, and then `--repeats` times
or more, all methods in turn and in a new random order each turn, until `--point_s` seconds are over. The slowest rank
of a turn counts; medians over turns are shown, and ratios are medians of the ratios within a turn, to what of ours
computes the same (`similarity_methods.py` lists the methods). A method that is expected to need more memory than
`--memory_gb` over all ranks, or to leave no time for three turns, is left out, and the reason printed. Memory is the
rise of resident memory in the uncounted turn, the largest over ranks; bytes are numel x itemsize handed to collectives
by a rank. The gradient is compared, on a sample of its elements, with ours.

Ends with exit code 1 and a list if at any point `auto` is slower than a layout or a peer beyond the spread of the runs
(its lower quartile above the other's upper quartile), or if a value or a gradient that should agree does not.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import similarity_report
import torch
import torch.distributed as dist
from bench_processes import Put, agreed, from_all, give_back_memory, in_processes, machine, resident, watch_memory
from similarity_methods import AUTO, Cost, Method, Size, chosen_layout, methods
from torch import Tensor

from scale_guide.statistics import count_bytes

GRID_ROWS = (64, 256, 1024, 4096, 16384)
GRID_WIDTHS = ((64, 64), (512, 768), (4096, 4096), (65536, 65536), (64, 65536))
README_SIZES = ("256,65536,65536", "4096,512,768")
MIN_TURNS = 3
SAMPLE = 65536
COMMON, PRIVATE = 4, 4


def make_rows(size: Size, rank: int, mean: float = 0.0) -> tuple[Tensor, Tensor]:
    """Returns this rank's x [b, p] and y [b, q]: `mean`, noise, common directions, and as many of each one's own.

    Neither near 0 nor near 1: a peer that clamps CKA to 0..1 would have no gradient there.
    """
    ours, everyone = torch.Generator().manual_seed(1 + rank), torch.Generator().manual_seed(0)
    common = torch.randn(size.b, COMMON, generator=ours)
    result = []
    for width in (size.p, size.q):
        latent = torch.cat([common, torch.randn(size.b, PRIVATE, generator=ours)], dim=1)
        rows = torch.randn(size.b, width, generator=ours)
        result.append(rows.addmm_(latent, torch.randn(COMMON + PRIVATE, width, generator=everyone)).add_(mean))
    return result[0], result[1]


def run_once(method: Method, x: Tensor, y: Tensor) -> tuple[float, Tensor, Tensor | None]:
    """Returns seconds, the value and, unless it is timed for its value only, the gradient [b, p]. Collective."""
    leaf = x.detach().requires_grad_(method.gradient != "value only")
    gc.collect()  # a peer leaves cycles behind that hold all rows
    dist.barrier()
    start = time.perf_counter()
    with torch.set_grad_enabled(leaf.requires_grad):
        value = method.call(leaf, y)
    if leaf.requires_grad:
        value.backward()
    return time.perf_counter() - start, value.detach(), leaf.grad


class Calibration:
    """This process's rates, measured with all ranks at work, and each method's time on next to nothing. Collective."""

    def __init__(self, chosen: Sequence[Method], x: Tensor, y: Tensor) -> None:
        square, vector = torch.ones(640, 640), torch.ones(2**22)
        self._flops = 2 * 640**3 / _best_seconds(lambda: square @ square)
        self._wire = len(vector) / _best_seconds(lambda: dist.all_reduce(vector.zero_()))
        self._touched = 2 * len(vector) / _best_seconds(lambda: vector.add_(1))
        self._least = {method.name: min(run_once(method, x, y)[0] for _ in range(3)) for method in chosen}

    def seconds(self, method: Method, cost: Cost) -> float:
        """Returns the time that a run of `method` is expected to take."""
        parts = cost.flops / self._flops, cost.wire / self._wire, cost.touched / self._touched
        return self._least[method.name] + sum(parts)


def _best_seconds(action: Callable[[], object]) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def too_large(size: Size, chosen: Sequence[Method], memory_gb: float) -> dict[str, str]:
    """Returns method -> reason for those expected to need more than `memory_gb` over all ranks."""
    inputs = size.b * (2 * size.p + size.q)
    needs = {m.name: size.w * (4 * (m.cost(size).held + inputs) + resident("VmRSS")) / 1e9 for m in chosen}
    return {name: f"needs {need:.0f} GB" for name, need in needs.items() if need > memory_gb}


def too_slow(seconds: dict[str, float], limit_s: float) -> dict[str, str]:
    """Returns method -> reason for the slowest ones, until three turns of the others take at most `limit_s`."""
    left, out = dict(seconds), {}
    while left and MIN_TURNS * sum(left.values()) > limit_s:
        # Without auto there is nothing to compare, so it goes last.
        slowest = max(left, key=lambda name: (name != AUTO, left[name]))
        out[slowest] = f"needs {left.pop(slowest):.1f} s a turn"
    return out


def time_point(
    size: Size, chosen: list[Method], mean: float, repeats: int, point_s: float, memory_gb: float
) -> dict[str, Any]:
    """Returns every figure of one point. Collective: every rank takes part in each decision."""
    start = time.perf_counter()
    give_back_memory()
    skipped = {m.name: f"{m.package} is not installed" for m in chosen if not m.installed}
    skipped |= agreed(too_large(size, [m for m in chosen if m.installed], memory_gb))
    left = _without(chosen, skipped)
    figures: dict[str, dict[str, Any]] = {}
    if left:
        x, y = make_rows(size, dist.get_rank(), mean)
        calibration = Calibration(left, x[:8, :8].clone(), y[:8, :8].clone())
        expected = agreed({m.name: calibration.seconds(m, m.cost(size)) for m in left})
        figures = first_turn(left, x, y, expected, start + point_s, skipped)
        for name, figure in figures.items():
            figure["expected_s"], figure["expected_memory"] = expected[name], 4 * methods()[name].cost(size).held
        spent = agreed(time.perf_counter() - start)
        skipped |= too_slow({name: figure["first_s"] for name, figure in figures.items()}, point_s - spent)
        take_turns(_without(left, skipped), x, y, figures, repeats, start + point_s)
    return {
        "size": list(size),
        "auto": chosen_layout(size),
        "methods": {name: figure for name, figure in figures.items() if figure["seconds"]},
        "skipped": skipped,
        "wall_s": time.perf_counter() - start,
    }


def _without(chosen: Sequence[Method], skipped: dict[str, str]) -> list[Method]:
    """Returns the methods that are left: a method whose reference is gone has nothing to be compared with."""
    for method in chosen:
        if method.reference in skipped:
            skipped.setdefault(method.name, f"{method.reference} {skipped[method.reference]}")
    return [method for method in chosen if method.name not in skipped]


def first_turn(
    chosen: Sequence[Method],
    x: Tensor,
    y: Tensor,
    expected: dict[str, float],
    end: float,
    skipped: dict[str, str],
) -> dict[str, dict[str, Any]]:
    """Returns memory, bytes, value and gradient of each method, run once; its time is not counted. Collective.

    Ours and the quick ones first; one that would leave no time for three turns goes to `skipped`.
    """
    truths: dict[str, tuple[Tensor, Tensor]] = {}
    worst: dict[str, dict[str, Any]] = {}
    for method in sorted(chosen, key=lambda m: (m.name != m.reference, expected[m.name])):
        turn = sum(figure["first_s"] for figure in worst.values())
        # Where the others took longer than expected, so will this one.
        alone = expected[method.name] * max(1.0, turn / max(sum(expected[name] for name in worst), 1e-9))
        needed = MIN_TURNS * turn + (MIN_TURNS + 1) * alone
        if not agreed(time.perf_counter() + needed < end):
            skipped[method.name] = f"needs {alone:.1f} s a turn"
        if not _without([method], skipped):
            continue
        ranks = from_all(look_at(method, x, y, truths))
        figure: dict[str, Any] = {field: max(rank[field] for rank in ranks) for field in ranks[0]}
        figure["gradient"] = sum(rank["gradient_square"] for rank in ranks) ** 0.5
        worst[method.name] = figure | {"seconds": []}
    return worst


def look_at(method: Method, x: Tensor, y: Tensor, truths: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Returns one rank's figures of one run, beside the value and gradient of its reference. Collective."""
    peak = watch_memory()
    with count_bytes() as sent:
        seconds, value, gradient = run_once(method, x, y)
    memory = peak()
    if gradient is None:
        gradient = torch.zeros(1, 1)
    sample = gradient.flatten()[:: max(1, gradient.numel() // SAMPLE)].clone()
    true_value, true_sample = truths.setdefault(method.reference, (value, sample))
    scale = dist.get_world_size() if method.gradient == "1/W" else 1
    return {
        "first_s": seconds,
        "memory": memory,
        "bytes": sent.num_bytes,
        "value": float(value),
        "value_off": abs(float(value) - float(true_value)),
        # By parts: in float64 the whole would double the memory of the point.
        "gradient_square": sum(float(part.double().square().sum()) for part in gradient.split(64)),
        "gradient_off": float((scale * sample - true_sample).norm() / true_sample.norm().clamp_min(1e-30)),
    }


def take_turns(
    chosen: Sequence[Method],
    x: Tensor,
    y: Tensor,
    figures: dict[str, dict[str, Any]],
    repeats: int,
    end: float,
) -> None:
    """Times all methods in turn, `repeats` times, or up to ten times as often for a second. Collective."""
    order, shuffler = list(chosen), random.Random(0)
    begin, lasts = time.perf_counter(), sum(figures[method.name]["first_s"] for method in chosen)
    for turn in range(10 * repeats if chosen else 0):
        now = time.perf_counter()
        if turn:
            lasts = (now - begin) / turn
        if not agreed(now + lasts < end and (turn < repeats or now - begin < 1)):
            return
        shuffler.shuffle(order)
        own = {method.name: run_once(method, x, y)[0] for method in order}
        ranks = from_all(own)
        for name in own:
            figures[name]["seconds"].append(max(rank[name] for rank in ranks))


def points(
    put: Put, sizes: Sequence[Size], wanted: Sequence[str], mean: float, repeats: int, point_s: float, memory_gb: float
) -> None:
    """Puts the figures of one point after another."""
    named = [m for m in methods().values() if m.name == AUTO or not wanted or any(w in m.name for w in wanted)]
    names = {m.reference for m in named} | {m.name for m in named}
    chosen = [m for m in methods().values() if m.name in names]
    for method in chosen:
        method.load()
    gc.freeze()  # modules are never freed: without them a collection takes no time
    for size in sizes:
        put(time_point(size, chosen, mean, repeats, point_s, memory_gb))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=[], help="N,p,q ...")
    parser.add_argument("--grid", action="store_true", help="N 64 to 16,384, p and q 64 to 65,536, W 1, 2 and 4")
    parser.add_argument("--processes", default="", help="numbers of processes, with commas")
    parser.add_argument("--repeats", type=int, default=9, help="turns, if there is time")
    parser.add_argument("--mean", type=float, default=0.0, help="added to all numbers, which spread by 3")
    parser.add_argument("--point_s", type=float, default=120, help="seconds for one point")
    parser.add_argument("--memory_gb", type=float, default=20, help="most memory, over all ranks")
    parser.add_argument("--methods", default="", help="only methods whose name holds one of these, with commas")
    parser.add_argument("--table", action="store_true", help="end with one Markdown table of all points")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    grid = [f"{n},{p},{q}" for n in GRID_ROWS for p, q in GRID_WIDTHS] if options.grid else []
    texts = [*options.sizes, *grid] or list(README_SIZES)
    processes = options.processes or ("1,2,4" if options.grid else "4")
    if any(text.count(",") != 2 for text in texts):
        parser.error("--sizes: give N,p,q, such as 1024,512,768.")
    options.points = [[Size.of(text, int(w)) for text in texts] for w in processes.split(",")]
    for size in (size for sizes in options.points for size in sizes):
        if size.n % size.w or size.n < 4:
            parser.error(
                f"--sizes: N={size.n} must be at least 4 and a multiple of the number of processes, {size.w}."
            )
    return options


def main() -> int:
    """Reads the command line, prints every point, and returns 1 if a verdict fails."""
    options = read_options()
    wanted = [word for word in options.methods.split(",") if word]
    found: dict[str, Any] = {"machine": machine(), "command": sys.argv[1:], "points": []}
    print(found["machine"])
    for sizes in options.points:
        given = (sizes, wanted, options.mean, options.repeats, options.point_s, options.memory_gb)
        for point in in_processes(points, sizes[0].w, *given):
            similarity_report.judge(point)
            found["points"].append(point)
            similarity_report.show(point)
            print(f"{len(found['points'])} points done, {point['wall_s']:.0f} s", file=sys.stderr, flush=True)
            if options.json:
                options.json.write_text(json.dumps(found))
    if options.table:
        similarity_report.show_table(found["points"])
    return similarity_report.show_verdict(found["points"])


if __name__ == "__main__":
    raise SystemExit(main())
