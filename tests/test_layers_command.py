"""scale-guide layers --measure: what it prints is what the formulas give, for every kind of rows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import cka
from torch import Tensor, nn

from scale_guide.__main__ import main
from scale_guide.build import build_network, build_task
from scale_guide.data_order import SeededDataset, TrainOrder
from scale_guide.models import _fcn
from scale_guide.recipe import read_recipe

IMAGES = """
task: {name: "toy:build"}
target: {name: deep_fcn, options: {depth: 3, first_width: 16, width: 16, batch_norm: false, dropout: 0.0}}
guide: {name: deep_fcn, options: {depth: 2, first_width: 16, width: 8, batch_norm: false, dropout: 0.0}}
training: {batch_size: 96, steps: 4}
"""
SEQUENCES = """
task: {name: copy_paste, options: {min_length: 2, max_length: 6, num_train: 64, num_validation: 1}}
target: {name: rnn, options: {embedding: 8, hidden: 12, layers: 2}}
guide: {name: transformer, options: {layers: 2, width: 16, heads: 2, feedforward: 32}, layers: blocks}
guidance: {pairs: [["layers.0", "gpt2.transformer.h.0"], ["layers.1", "gpt2.transformer.h.1"]], rows: HOW}
training: {batch_size: 24, micro_batch_size: 7, steps: 4}
"""
SENTENCE = re.compile(
    r"^(?P<target>\S+) <- (?P<guide>\S+): CKA (?P<cka>[\d.]+) \(debiased (?P<debiased>-?[\d.]+); unrelated rows would "
    r"give (?P<floor>[\d.]+)\) over (?P<rows>[\d,]+) rows; effective dimensions (?P<ours>[\d.,]+) and "
    r"(?P<theirs>[\d.,]+): a floor below 0\.1 needs (?P<needed>[\d,]+) rows, (?P=rows) are "
    r"(?P<verdict>enough|TOO FEW)\.$",
    re.MULTILINE,
)


def measured(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[list[Any], str]:
    """Returns the sentences, taken apart, and all that was printed."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert main(["layers", "--config", str(path), "--measure", *options]) == 0
    printed = capsys.readouterr().out
    return [match.groupdict() for match in SENTENCE.finditer(printed)], printed


def outputs(model: nn.Module, names: set[str], inputs: Tensor) -> dict[str, Tensor]:
    """Returns the outputs of modules, in float64."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    modules = dict(model.double().named_modules())
    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return found


def whole_batch(text: str, tmp_path: Path) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """Returns both networks of a recipe and the first batch of training, in one piece."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    recipe, _ = read_recipe("layers", ["--config", str(path)])
    task, size = build_task(recipe), recipe.training.batch_size
    order = TrainOrder(
        len(task.train), size, micro_batch_size=size, rank=0, world_size=1, seed=0, first_step=0, last_step=1
    )
    samples = SeededDataset(task.train, 0)
    batch = task.collate([samples[key] for key in next(iter(order))])
    return build_network("target", recipe, task), build_network("guide", recipe, task).eval(), batch


def check(found: Any, x: Tensor, y: Tensor) -> None:
    assert float(found["cka"]) == pytest.approx(float(cka(x, y)), abs=6e-4)
    assert float(found["debiased"]) == pytest.approx(float(cka(x, y, "debiased")), abs=6e-4)
    assert int(found["rows"].replace(",", "")) == len(x)
    shuffled = [float(cka(x, y[torch.randperm(len(x))])) for _ in range(200)]
    assert float(found["floor"]) == pytest.approx(sum(shuffled) / 200, rel=0.1)


def test_pairs_of_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, printed = measured(IMAGES, tmp_path, capsys)
    assert [(pair["target"], pair["guide"]) for pair in found] == [
        ("hidden.0.linear", "hidden.0.linear"),
        ("hidden.2.linear", "hidden.1.linear"),
    ]
    target, guide, batch = whole_batch(IMAGES, tmp_path)
    ours = outputs(target, {"hidden.0.linear", "hidden.2.linear"}, batch["input"].double())
    theirs = outputs(guide, {"hidden.0.linear", "hidden.1.linear"}, batch["input"].double())
    for pair in found:
        check(pair, ours[pair["target"]], theirs[pair["guide"]])
        needed = 1 + 10 * (float(pair["ours"]) * float(pair["theirs"])) ** 0.5
        assert int(pair["needed"]) == pytest.approx(needed, abs=2)
        assert (pair["verdict"] == "enough") == (int(pair["needed"]) <= 96)
    enough = sum(pair["verdict"] == "enough" for pair in found)
    last = printed.strip().splitlines()[-1]
    assert last.startswith(f"{enough} of 2 pairs have rows enough; the neediest, ")
    assert printed.index("pairs (even)") < printed.index("over 96 rows"), "the tables come first"


@pytest.mark.parametrize("how", ["token", "flatten", "mean", "last"])
def test_pairs_of_sequences(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Padding has no part in the figures, and one row is what the recipe says."""
    text = SEQUENCES.replace("HOW", how)
    found, _ = measured(text, tmp_path, capsys)
    assert len(found) == 2
    target, guide, batch = whole_batch(text, tmp_path)
    mask = batch["mask"]
    ours = outputs(target, {"layers.0", "layers.1"}, batch["input"])
    theirs = outputs(guide, {"gpt2.transformer.h.0", "gpt2.transformer.h.1"}, batch["input"])
    for pair in found:
        x, y = (literal_rows(side, mask, how) for side in (ours[pair["target"]], theirs[pair["guide"]]))
        check(pair, x, y)


def literal_rows(output: Tensor, mask: Tensor, how: str) -> Tensor:
    if how == "token":
        return output[mask]
    if how == "mean":
        return torch.stack([rows[real].mean(0) for rows, real in zip(output, mask, strict=True)])
    if how == "last":
        return torch.stack([rows[real][-1] for rows, real in zip(output, mask, strict=True)])
    means = torch.stack([output[:, t][mask[:, t]].mean(0) for t in range(output.shape[1]) if mask[:, t].any()])
    columns = [torch.where(mask[:, t, None], output[:, t], means[t]) for t in range(len(means))]
    return torch.cat(columns, dim=1)


def test_it_runs_in_pieces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of micro_batch_size examples at most, or 64, and never a single one, which BatchNorm could not take."""
    seen: list[int] = []
    right = _fcn.FCN.forward

    def forward(self: _fcn.FCN, images: Tensor) -> Tensor:
        if images.device.type != "meta" and self.training:
            seen.append(len(images))
        return right(self, images)

    monkeypatch.setattr(_fcn.FCN, "forward", forward)
    with_norm = IMAGES.replace("batch_norm: false, dropout: 0.0}}\nguide", "batch_norm: true, dropout: 0.1}}\nguide")
    one_piece, _ = measured(IMAGES, tmp_path, capsys, "--training.micro_batch_size=96")
    pieces, _ = measured(IMAGES, tmp_path, capsys, "--training.micro_batch_size=16")
    assert seen == [96] + [16] * 6
    assert pieces == one_piece, "the pieces make one batch"
    seen.clear()
    first, _ = measured(with_norm, tmp_path, capsys, "--training.batch_size=65")
    again, _ = measured(with_norm, tmp_path, capsys, "--training.batch_size=65")
    assert seen == [32, 33] * 2
    assert first == again, "dropout is seeded"


def test_a_batch_larger_than_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = measured(IMAGES, tmp_path, capsys, "--training.batch_size=512")
    assert found[0]["rows"] == "320"


class Flat(nn.Module):
    """Two layers, the second of which gives the same for every row."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.dead, self.head = nn.Linear(12, 400), nn.Linear(400, 7), nn.Linear(7, 5)
        nn.init.zeros_(self.dead.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dead(self.alive(x.flatten(1).sign() * 10).relu().sqrt()))


def flat() -> nn.Module:
    """Returns the network with a dead layer."""
    return Flat()


def test_a_dead_layer_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = IMAGES.replace(
        "{name: deep_fcn, options: {depth: 3, first_width: 16, width: 16, batch_norm: false, dropout: 0.0}}",
        '{name: "test_layers_command:flat"}',
    )
    found, printed = measured(text, tmp_path, capsys)
    assert len(found) == 1
    assert "dead <- hidden.1.linear: no spread in the target layer (all 96 rows are equal)" in printed
    assert "of 2 pairs have rows enough (1 with a layer without spread)" in printed


def test_too_few_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, printed = measured(IMAGES, tmp_path, capsys, "--training.batch_size=12")
    assert {pair["verdict"] for pair in found} == {"TOO FEW"}
    assert re.search(r"needs \d+, \d+\.\d times this batch: raise training\.batch_size, or use deb", printed)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--guidance.weight=0"], "--measure has no pairs to measure"),
        (["--training.batch_size=3"], "at least 4 rows"),
        (["--measrue"], "did you mean 'measure'?"),
    ],
)
def test_mistakes(options: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(IMAGES)
    assert main(["layers", "--config", str(path), "--measure", *options]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.strip().splitlines()) == 1


def test_help_explains_it(capsys: pytest.CaptureFixture[str]) -> None:
    for command, text in (("layers", "the rows it needs for a floor below 0.1"), ("plan", "processes to plan for")):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
        assert text in " ".join(capsys.readouterr().out.split())
