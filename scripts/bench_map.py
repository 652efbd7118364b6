"""Times the map of CKA between all convolutions of two ResNet-18 against torch-cka and pytorch-cka, alternately.

    python scripts/bench_map.py                     1,024 images of 224 x 224 in minibatches of 64; half an hour
    python scripts/bench_map.py --image_size 64     minutes

After one turn that is not counted every way is run `--repeats` times, all in turn and in a new random order each turn,
on copies of the same networks (untrained, seeds 0 and 1), the same 20 layers each and the same minibatches of
scikit-learn's digits. Medians are shown, and medians of the ratios within a turn. Peers get their minibatches ready in
memory and run without gradient; ours reads samples by its own loader, and is timed with and without intrinsic
dimensions. The largest error is that to a literal computation in float64 on one minibatch.

Ends with exit code 1 if a peer is as fast as ours in the median, or if ours is off by more than 1e-4.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # before torch-cka is imported: it draws a bar at every call

import torch
from bench_processes import machine
from torch import Tensor, nn
from torchvision.models import resnet18

from scale_guide.analysis.cka_map import cka, compare
from scale_guide.analysis.intrinsic_dimension import MAX_POINTS
from scale_guide.engine import Engine
from scale_guide.evaluate import Samples
from scale_guide.layer_map import candidates
from scale_guide.networks import Network
from scale_guide.tasks import image_classification

OURS = "scale_guide"
TOLERANCE = 1e-4
Way = Callable[[Samples], Tensor]


class Batches(list[tuple[Tensor]]):
    """What torch-cka and pytorch-cka need of a DataLoader, without the cost of one."""

    dataset = "digits"


def digits(num_images: int, image_size: int, batch_size: int) -> Samples:
    """Returns samples of the 1,400 training digits, which are more than the validation ones."""
    task: Any = image_classification.build(image_size=image_size)
    task.validation = task.train
    return Samples(task, num_images, batch_size)


def resnets() -> list[nn.Module]:
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(resnet18(num_classes=10).eval().requires_grad_(False))
    return models


def ways(engine: Engine) -> dict[str, Way]:
    """Returns what is timed, by name: samples -> map [20, 20]. Peers that are not installed are left out."""
    models = resnets()
    layers = [name for name in candidates(models[0], "weights") if name != "fc"]
    networks = {name: Network(model, "weights", model) for name, model in zip("ab", resnets(), strict=True)}
    ready: dict[int, Batches] = {}

    def batches(samples: Samples) -> Batches:
        if id(samples) not in ready:
            ready[id(samples)] = Batches((batch["input"],) for _, batch in samples.batches(engine, ""))
        return ready[id(samples)]

    def torch_cka(samples: Samples) -> Tensor:
        kind = importlib.import_module("torch_cka").CKA
        compared = kind(*copy.deepcopy(models), "a", "b", layers, layers)  # it never takes its hooks off
        with torch.no_grad():
            compared.compare(batches(samples), batches(samples))
        return compared.hsic_matrix  # type: ignore[no-any-return]

    def pytorch_cka(samples: Samples) -> Tensor:
        compute = importlib.import_module("cka").compute_cka
        return compute(*models, batches(samples), layers=layers, device="cpu", progress=False)[0]  # type: ignore[no-any-return]

    def ours(samples: Samples, max_points: int = 0) -> Tensor:
        return torch.tensor(compare(networks, samples, engine, max_points=max_points).between("a", "b"))

    peers = {"torch-cka": ("torch_cka", torch_cka), "pytorch-cka": ("cka", pytorch_cka)}
    found: dict[str, Way] = {OURS: ours, f"{OURS}, with dimensions": lambda samples: ours(samples, MAX_POINTS)}
    return found | {name: way for name, (package, way) in peers.items() if importlib.util.find_spec(package)}


def literal(samples: Samples, engine: Engine) -> Tensor:
    """Returns the map in float64, from HSIC_1 as it is written (Song et al. 2012, eq. 5)."""
    models = [model.double() for model in resnets()]
    seen: list[Tensor] = []
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda module, args, output: seen.append(output.flatten(1)))
    sums: Any = 0
    for _, batch in samples.batches(engine, ""):
        seen.clear()
        for model in models:
            model(batch["input"].double())
        m, one = len(batch["input"]), torch.ones(len(batch["input"]), dtype=torch.float64)
        grams = [(x @ x.T).fill_diagonal_(0) for x in seen]
        table = [
            [
                (k * g).sum() + k.sum() * g.sum() / ((m - 1) * (m - 2)) - 2 / (m - 2) * (one @ k @ g @ one)
                for g in grams
            ]
            for k in grams
        ]
        sums = sums + torch.tensor(table) / (m - 3)
    whole = cka(sums)
    return whole[: len(whole) // 2, len(whole) // 2 :]


def take_turns(chosen: dict[str, Way], samples: Samples, repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of each way in each turn."""
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    order, shuffler = list(chosen), random.Random(0)
    for turn in range(repeats + 1):
        shuffler.shuffle(order)
        for name in order:
            start = time.perf_counter()
            chosen[name](samples)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024, help="at most 1,400")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def main() -> int:
    """Reads the command line, prints the table, and returns 1 if a peer is as fast or ours is off."""
    options = read_options()
    warnings.simplefilter("ignore")  # of the peers
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    engine = Engine()
    chosen = ways(engine)
    few = digits(options.batch_size, options.image_size, options.batch_size)
    truth = literal(few, engine)
    errors = {name: float((way(few) - truth).abs().max()) for name, way in chosen.items()}
    seconds = take_turns(chosen, digits(options.images, options.image_size, options.batch_size), options.repeats)
    print(
        f"{machine()}, {torch.get_num_threads()} threads; ResNet-18 x ResNet-18, {options.images:,} images of "
        f"{options.image_size} x {options.image_size}, minibatches of {options.batch_size}, {options.repeats} turns"
        "\n\n| way | seconds | times ours | largest error |\n|---|---|---|---|"
    )
    failed = errors[OURS] > TOLERANCE
    for name, turns in seconds.items():
        ratio = statistics.median(mine / own for mine, own in zip(turns, seconds[OURS], strict=True))
        failed |= not name.startswith(OURS) and ratio <= 1
        print(f"| {name} | {statistics.median(turns):.2f} | {ratio:.2f} | {errors[name]:.1e} |")
    engine.close()
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
