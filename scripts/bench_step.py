"""What a guided step costs beyond its parts: guided / (target forward and backward + guide forward + bare products).

    python scripts/bench_step.py                             the quickstart's networks, one process
    python scripts/bench_step.py --config small/language_model --task.options.data FOLDER

One process on the CPU; the four parts are run in turn, `--repeats` times after one turn to warm up; medians are shown.
The bare products are the matrix products that the plan's statistics and their gradient consist of, on ready fp32
tensors of the same shapes: what no implementation can do without.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from scale_guide.build import build_guidance, build_guide, build_network, build_task, trace_recipe
from scale_guide.recipe import read_recipe
from scale_guide.statistics import Plan


def bare_products(plan: Plan) -> Callable[[], None]:
    """Returns a function that does only the matrix products of `plan`, forward and gradient."""
    rows = {node: torch.randn(plan.num_rows, width) for node, width in plan.widths.items()}
    grams = {node for name in ("gather", "transpose") for pair in plan.pairs(name) for node in pair.nodes}
    covariances = {node for pair in plan.pairs("covariance") for node in pair.nodes}

    def products() -> None:
        for node in grams:
            gram = rows[node] @ rows[node].T
            if node[0] == "target":
                gram @ rows[node]
        for node in covariances:
            outer = rows[node].T @ rows[node]
            if node[0] == "target":
                rows[node] @ outer
        for pair in plan.pairs("covariance"):
            x, y = pair.nodes
            rows[y] @ (rows[x].T @ rows[y]).T

    return products


def main() -> None:
    """Reads the command line, times the four parts in turn, and prints their medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart", help="recipe")
    parser.add_argument("--repeats", type=int, default=15)
    options, overrides = parser.parse_known_args()
    recipe, _ = read_recipe("train", ["--config", options.config, *overrides])
    task = build_task(recipe)
    batch = task.collate([task.train[i] for i in range(recipe.training.batch_size)])
    target, guide = build_network("target", recipe, task).train(), build_guide(recipe, task, torch.device("cpu"))
    guidance = build_guidance(recipe, trace_recipe(recipe, task), target, guide)

    def guided() -> None:
        with guidance.record(weights=batch.get("weight"), mask=batch.get("mask")):
            guidance.run_guide(batch["input"])
            output = target(batch["input"])
        (task.loss(output, batch) / task.count(batch) + guidance.loss()).backward()

    def unguided() -> None:
        (task.loss(target(batch["input"]), batch) / task.count(batch)).backward()

    guided()
    assert guidance.plan is not None, "made in the first step"
    parts: dict[str, Callable[[], object]] = {
        "guided step": guided,
        "target forward and backward": unguided,
        "guide forward": lambda: guide(batch["input"]),
        "bare products": bare_products(guidance.plan),
    }
    turns = [{name: _seconds(part) for name, part in parts.items()} for _ in range(options.repeats + 1)][1:]
    print(f"{options.config}: {guidance.plan}; {torch.get_num_threads()} threads, {options.repeats} repeats")
    for name in parts:
        print(f"{name:30} {statistics.median(turn[name] for turn in turns) * 1000:9.1f} ms")
    ratios = [turn["guided step"] / sum(s for name, s in turn.items() if name != "guided step") for turn in turns]
    print(f"{'guided step / sum of the parts':30} {statistics.median(ratios):9.3f}")


def _seconds(part: Callable[[], object]) -> float:
    start = time.perf_counter()
    part()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
