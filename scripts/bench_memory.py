"""Peak memory of one guided step over k micro-batches of a fixed size, ours and the others', each in fresh processes.

    python scripts/bench_memory.py --table --figure scripts/figures/memory.png --json memory.json
    python scripts/bench_memory.py --settings tokens --processes 2 --micro_batches 1,8,64 --methods covariance

Two settings: `tokens`, many rows of few columns, where covariances are small; and `wide`, few rows of many columns,
where Gram matrices are. A figure is the rise of memory during the step above model, gradients and everything that a
first small step leaves, the largest over ranks: resident memory on CPU (freed tensors given back at once), torch's own
count for W=1 where there is a GPU. Inputs are made anew for each micro-batch. Beside it stands what must be kept by
design: rows of all micro-batches, copies of one network's rows while they cross the ranks, and K and L. A point that
would need more than `--memory_gb` over all ranks is left out.

Ends with exit code 1 if `covariance` is not flat over k (largest over smallest peak above 1.05), if a Gram layout
grows by more than those rows and four times K and L (their gradients, and what lies between), or if two methods
disagree about loss or gradient.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_processes import Put, from_all, in_processes, keep_no_freed_memory, machine, resident, watch_memory
from memory_methods import FLOAT_BYTES, GRAM_COPIES, METHODS, OURS, SETTINGS, Setting, make_step, predict

FLAT = 1.05
AGREE = 1e-3
SLACK = 2**20
PARTS = {"rows": "rows kept", "wire": "rows on the way", "matrices": "K and L"}
"""What grows with k by design."""
SMALL_ROWS = 8
"""Of the first step, which brings up what is made once: hooks, threads, connections, gradients."""


def measure(put: Put, method: str, name: str, k: int, on_gpu: bool) -> None:
    """Puts peak bytes, guidance loss and gradient norm of one step. Runs on every rank."""
    keep_no_freed_memory()
    setting: Setting = SETTINGS[name]
    device = "cuda" if on_gpu else "cpu"
    step = make_step(method, setting, k, device)
    step(min(k, 2), SMALL_ROWS)
    for parameter in step.target.parameters():
        assert parameter.grad is not None, "the first step reached every layer"
        parameter.grad.zero_()
    gc.freeze()
    peak = watch_memory(device)
    loss = step(k, setting.rows)
    ranks = from_all((peak(), float(loss)))
    square = 0.0
    for parameter in step.target.parameters():
        gradient = parameter.grad.cpu() / dist.get_world_size()  # type: ignore[union-attr]
        dist.all_reduce(gradient)
        square += float(gradient.double().square().sum())
    put({"peak": max(bytes_ for bytes_, _ in ranks), "loss": ranks[0][1], "gradient": square**0.5})


def sweep(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields one entry per setting, W, method and k: the figures, or why it was left out."""
    for name, w, method, k in product(options.settings, options.processes, options.methods, options.micro_batches):
        predicted = predict(method, SETTINGS[name], k, w)
        entry: dict[str, Any] = {"setting": name, "w": w, "method": method, "k": k}
        entry |= {part: getattr(predicted, part) for part in PARTS}
        # A rank takes about as much as this process before it has a tensor.
        need = w * (predicted.worst + resident("VmRSS")) / 1e9
        if method.startswith("covariance") and not SETTINGS[name].covariance:
            entry["left_out"] = f"[p, p] is {FLOAT_BYTES * SETTINGS[name].columns ** 2 / 1e9:.1f} GB"
        elif need > options.memory_gb:
            entry["left_out"] = f"needs {need:.0f} GB"
        else:
            (figures,) = in_processes(measure, w, method, name, k, w == 1 and torch.cuda.is_available())
            entry |= figures
        text = entry.get("left_out") or f"{entry['peak'] / 1e6:.1f} MB"
        print(f"{name} W={w} k={k} {method}: {text}", flush=True)
        yield entry


def series(entries: Sequence[dict[str, Any]]) -> dict[tuple[str, int, str], list[dict[str, Any]]]:
    """Returns (setting, W, method) -> its measured entries, by k."""
    lines: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for entry in entries:
        if "peak" in entry:
            lines.setdefault((entry["setting"], entry["w"], entry["method"]), []).append(entry)
    return lines


def judge(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Returns what is not as promised, in sentences."""
    failures = []
    for (name, w, method), line in series(entries).items():
        place = f"{name} W={w} {method}"
        peaks = [entry["peak"] for entry in line]
        if method == "covariance" and max(peaks) > FLAT * min(peaks):
            failures.append(f"{place}: not flat over k, {max(peaks) / min(peaks):.3f} > {FLAT}")
        for entry in line if method in ("transpose", "gather") else ():
            grown = entry["peak"] - line[0]["peak"]
            allowed = SLACK + entry["rows"] + entry["wire"] + GRAM_COPIES * entry["matrices"]
            if grown > allowed:
                failures.append(f"{place}: grew by {grown / 1e6:.1f} MB at k={entry['k']}, not {allowed / 1e6:.1f}")
    for name, w, k in dict.fromkeys((entry["setting"], entry["w"], entry["k"]) for entry in entries):
        same = [e for e in entries if (e["setting"], e["w"], e["k"]) == (name, w, k) and "peak" in e]
        for figure in ("loss", "gradient"):
            values = [entry[figure] for entry in same]
            # `not <=` sees NaN too.
            if any(not abs(value - values[0]) <= AGREE * abs(values[0]) for value in values):
                failures.append(f"{name} W={w} k={k}: the methods disagree about the {figure}: {values}")
    return failures


def show_table(entries: Sequence[dict[str, Any]]) -> None:
    """Prints a Markdown table per setting and W: peak MB by method and k, and what must be kept by design."""
    ks = sorted({entry["k"] for entry in entries})
    for name, w in dict.fromkeys((entry["setting"], entry["w"]) for entry in entries):
        here = [entry for entry in entries if (entry["setting"], entry["w"]) == (name, w)]
        print(f"\n| {name}, W={w}: peak MB | {' | '.join(f'k={k}' for k in ks)} | largest / smallest |")
        print("|" + "---|" * (len(ks) + 2))
        for method in dict.fromkeys(entry["method"] for entry in here):
            line = [entry for entry in here if entry["method"] == method]
            peaks = [entry["peak"] for entry in line if "peak" in entry]
            ratio = f"{max(peaks) / min(peaks):.2f}" if len(peaks) > 1 else "-"
            cells = [f"{e['peak'] / 1e6:.1f}" if "peak" in e else e["left_out"] for e in line]
            print(f"| {method} | {' | '.join(cells)} | {ratio} |")
            if method in OURS:
                for part, words in PARTS.items():
                    if any(entry[part] for entry in line):
                        print(f"| - {words} | {' | '.join(f'{entry[part] / 1e6:.1f}' for entry in line)} | |")


def draw(entries: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws peak memory over k, a panel per setting and W, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    places = list(dict.fromkeys((entry["setting"], entry["w"]) for entry in entries))
    figure, axes = pyplot.subplots(1, len(places), figsize=(3.6 * len(places), 3.4), squeeze=False, sharey=True)
    for (name, w, method), line in series(entries).items():
        axis = axes[0][places.index((name, w))]
        axis.plot(
            [entry["k"] for entry in line],
            [entry["peak"] / 1e6 for entry in line],
            "o-",
            color=f"C{METHODS.index(method)}",
            label=method,
            markersize=3,
        )
        setting = SETTINGS[name]
        title = f"{name}: {setting.rows} rows of {setting.columns:,}, W={w}"
        axis.set(title=title, xlabel="micro-batches a step", yscale="log")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("peak memory of a step, MB a process")
    axes[0][0].legend(fontsize="x-small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def read_options() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    def words(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=words, default=list(SETTINGS), help="tokens,wide")
    parser.add_argument("--processes", type=numbers, default=[1, 2], help="numbers of processes, with commas")
    parser.add_argument("--micro_batches", type=numbers, default=[2**i for i in range(7)], help="k, with commas")
    parser.add_argument("--methods", type=words, default=list(METHODS), help=", ".join(METHODS))
    parser.add_argument("--memory_gb", type=float, default=20, help="most memory, over all ranks")
    parser.add_argument("--table", action="store_true", help="print Markdown tables")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--figure", type=Path, help="file for the picture")
    return parser.parse_args()


def main() -> int:
    """Reads the command line, measures, prints, and returns 1 if a promise is not kept."""
    options = read_options()
    found: dict[str, Any] = {"machine": machine(), "command": sys.argv[1:], "entries": []}
    print(found["machine"])
    for entry in sweep(options):
        found["entries"].append(entry)
        if options.json:
            options.json.write_text(json.dumps(found))
    failures = judge(found["entries"])
    if options.table:
        show_table(found["entries"])
    if options.figure:
        draw(found["entries"], options.figure)
    for failure in failures:
        print(f"FAILS: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
