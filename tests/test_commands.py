"""The commands: what they print, what they leave, and what they say to mistakes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from scale_guide.__main__ import main
from scale_guide.guide import fingerprint
from scale_guide.models import deep_fcn
from scale_guide.recipe import read_recipe, variants
from scale_guide.tracking import read_metrics

TINY = """
task: {name: "toy:build"}
target: {name: deep_fcn, options: {depth: 3, first_width: 16, width: 16}}
guide: {name: deep_fcn, options: {depth: 2, first_width: 16, width: 8, batch_norm: false}}
training: {batch_size: 32, steps: 4, num_workers: 0, log_every: 2, evaluate_every: 2}
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def finished(tiny: Path) -> Path:
    """The folder of a finished run with two variants."""
    recipe = yaml.safe_load(TINY) | {"variants": {"unguided": {"guidance.weight": 0}, "guided": {}}}
    path = tiny.parent / "two.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["train", "--config", str(path), "--run_dir", str(tiny.parent / "two")]) == 0
    return tiny.parent / "two"


def test_variants_leave_whole_runs_and_a_comparison(finished: Path) -> None:
    """Both run from the same weights and data; each folder is whole; table and pictures are there."""
    for name in ("unguided", "guided"):
        files = {p.name for p in (finished / name).iterdir()}
        wanted = {
            "config.yaml",
            "environment.json",
            "layers.json",
            "metrics.jsonl",
            "summary.json",
            "target",
            "checkpoints",
        }
        assert wanted | {"target", "checkpoints"} <= files
    report = (finished / "report.md").read_text()
    assert "| unguided |" in report
    assert "| guided   |" in report
    assert "validation accuracy" in report
    assert (finished / "report.html").stat().st_size > 10_000
    assert (finished / "figures/losses.png").stat().st_size > 1000
    lines = read_metrics(finished / "guided")
    assert [line["step"] for line in lines] == [2, 2, 4, 4]
    needed = {"learning_rate", "task_loss", "guidance_loss", "similarity", "pairs", "rows_per_s", "seconds"}
    assert needed | {"gradient_norm_at_activations", "guidance_seconds", "guidance_bytes"} <= lines[0].keys()
    assert all(pair.keys() == {"similarity", "debiased", "floor"} for pair in lines[0]["pairs"].values())
    assert "pairs" not in read_metrics(finished / "unguided")[0]
    environment = json.loads((finished / "guided/environment.json").read_text())
    assert len(environment["guide_hash"]) == 64
    assert environment["batch_size"] == 32
    assert environment["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_the_first_loss_of_both_variants_is_the_same_network_on_the_same_data(finished: Path, tiny: Path) -> None:
    for name, weight in (("with", "1"), ("without", "0")):
        options = ["--guidance.weight", weight, "--training.steps=1", "--training.log_every=1"]
        assert main(["train", "--config", str(tiny), "--run_dir", str(finished / name), *options]) == 0
    first = [read_metrics(finished / name)[0]["task_loss"] for name in ("with", "without")]
    assert first[0] == first[1]


def test_the_target_loads_without_the_trainer(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """target/ is a state dict and how to build the network; `evaluate` gives the summary's scores."""
    folder = finished / "guided/target"
    described = json.loads((folder / "config.json").read_text())
    network = deep_fcn.build(**described["facts"], **described["options"])
    network.load_state_dict(load_file(folder / "model.safetensors"))
    summary = json.loads((finished / "guided/summary.json").read_text())
    capsys.readouterr()
    assert main(["evaluate", str(finished / "guided")]) == 0
    scores = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert scores["accuracy"] == pytest.approx(summary["validation"]["accuracy"])
    assert scores["count"] == 37, "every validation row once, though 37 is no multiple of the batch"
    (finished / "guided/summary.json").rename(finished / "guided/summary.kept")
    assert main(["evaluate", str(finished / "guided")]) == 0
    unfinished = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    (finished / "guided/summary.kept").rename(finished / "guided/summary.json")
    assert "step_00000004" in unfinished["weights"], "a running run is scored at its newest checkpoint"
    assert unfinished["accuracy"] == scores["accuracy"]


def test_finished_variants_are_skipped(finished: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", str(tiny.parent / "two.yaml"), "--run_dir", str(finished)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("already finished") == 2
    assert "| guided   |" in printed


def test_report(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(finished / name) for name in ("guided", "unguided")]
    assert main(["report", *runs, "--out", str(tmp_path)]) == 0
    assert "validation loss" in capsys.readouterr().out
    assert (tmp_path / "report.html").exists()
    assert main(["report", str(finished.parent / "tow")]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_layers(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both lists in execution order with shapes, and the pairs; the lists can be chosen on the command line."""
    assert main(["layers", "--config", str(tiny)]) == 0
    printed = capsys.readouterr().out
    assert printed.index("hidden.0.linear") < printed.index("hidden.2.linear")
    assert "| hidden.2.linear | hidden.1.linear | 1      |" in printed
    assert "head" not in printed, "logits are excluded"
    assert main(["layers", "--config", str(tiny), "--target.layers", "[hidden.*.relu]"]) == 0
    assert "hidden.0.relu" in capsys.readouterr().out
    factors = ["--guidance.layer_weights", "{'hidden.*': 0.5, hidden.0.linear: 0}"]
    assert main(["layers", "--config", str(tiny), *factors]) == 0
    printed = capsys.readouterr().out
    assert "| hidden.2.linear | hidden.1.linear | 0.5    |" in printed
    assert "| hidden.0.linear | hidden.0.linear |" not in printed


def test_plan(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(tiny), "--num_processes", "4", "--training.batch_size", "256"]) == 0
    printed = capsys.readouterr().out
    assert "256 rows = 4 processes x 64" in printed
    assert "covariance" in printed
    assert "| hidden.2.linear | hidden.1.linear | 16 | 8  | 0.044" in printed
    assert main(["plan", "--config", str(tiny), "--num_processes=3"]) == 2
    assert "multiple of 3" in capsys.readouterr().err


def test_unreadable_rows_are_counted_and_listed(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    options = ["--task.options", "{unreadable: 7}", "--training.steps=null", "--training.epochs=1"]
    assert main(["train", "--config", str(tiny), "--run_dir", str(run_dir), *options]) == 0
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["num_unreadable"], summary["unreadable"]) == (1, ["row 7"])
    assert "unreadable" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian"], "command 'trian' is not known (did you mean 'train'?)"),
        (["train", "--config", "no_such_recipe"], "recipe='no_such_recipe' is not known"),
        (["train", "--guidance.wieght=1"], "--guidance.wieght is not an option (did you mean 'guidance.weight'?)"),
        (["train", "--guidance.weight=much"], "guidance.weight"),
        (["train", "--optimizer.name=adma"], "optimizer.name"),
        (["train", "--target.name=deep_fnc"], "'deep_fnc' is not known (did you mean 'deep_fcn'?)"),
        (["train", "--target.options.detph=3"], "'detph' is not known (did you mean 'depth'?)"),
        (["train", "--target.options.num_classes=3"], "the task scores (2,) terms of 5 classes"),
        (["train", "--target.layers=wieghts"], "did you mean 'weights'?"),
        (["train", "--guide.layers=[hiden.0.linear]"], "hidden.0.linear"),
        (["train", "--guidance.similarity=ckaa"], "did you mean 'cka'?"),
        (["train", "--guidance.pairs=[]"], "guidance.pairs"),
        (["train", "--guidance.layer_weights={hidden.0.liner: 2}"], "did you mean 'hidden.0.linear'?"),
        (["train", "--guidance.warmup_steps=4"], "less than the 4 steps"),
        (["train", "--guidance.warmup_steps=2", "--guidance.weight=0"], "nothing to minimise"),
        (["train", "--training.batch_size=3"], "at least 4 rows"),
        (["train", "--training.epochs=2"], "exactly one is needed"),
        (["train", "--trackers=[tensorbord]"], "'tensorbord' is not known (did you mean 'tensorboard'?)"),
        (["train", "--guide.weights=nowhere.safetensors"], "does not exist"),
        (["train", "--variants", "{a: {guidance.wieght: 0}}"], "variants.a: guidance.wieght is not an option"),
        (["plan", "--config", "RECIPE", "--guidance.weight=0"], "nothing to plan"),
        (["evaluate", "RUNS"], "holds no config.yaml"),
    ],
)
def test_mistakes(
    arguments: list[str], told: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit code 2, no traceback, nothing left behind."""
    places = {"RECIPE": str(tiny), "RUNS": str(tmp_path)}
    given = [places.get(word, word) for word in arguments]
    if arguments[0] == "train" and "--config" not in arguments:
        given += ["--config", str(tiny), "--run_dir", str(tmp_path / "run")]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.startswith("scale-guide: error: ")
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_mistakes_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt name in YAML names the file and the closest option; so does a file that is no recipe."""
    path = tmp_path / "bad.yaml"
    path.write_text("guidance: {simlarity: cka}")
    assert main(["train", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{path}: guidance.simlarity is not an option (did you mean 'guidance.similarity'?)" in error
    for text in ("[1, 2]", "a: [1"):
        path.write_text(text)
        assert main(["train", "--config", str(path)]) == 2
        assert str(path) in capsys.readouterr().err


def test_other_ranks_keep_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == ""


def test_overrides_reach_every_variant(tiny: Path) -> None:
    """The command line overrides the recipe, a variant overrides both."""
    given = ["--config", str(tiny), "--optimizer.lr=0.5", "--guidance.weight=3", "--target.options.depth=5"]
    given = given[2:] + given[:2]  # --config may stand anywhere
    recipe, _ = read_recipe("train", [*given, "--variants", "{a: {guidance.weight: 0}, b: {target.options.width: 9}}"])
    a, b = variants(recipe).values()
    assert (a.optimizer.lr, a.guidance.weight, b.guidance.weight) == (0.5, 0, 3)
    assert b.target.options == {"depth": 5, "first_width": 16, "width": 9}
    assert recipe.run_dir == "runs/tiny"
    assert (a.run_dir, b.run_dir) == ("runs/tiny/a", "runs/tiny/b")
    assert a.variants == {}


def test_trackers(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    options = ["--run_dir", str(tmp_path / "run"), "--trackers=[tensorboard]", "--training.steps=2"]
    assert main(["train", "--config", str(tiny), *options]) == 0
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "evaluate" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    assert "Weight of the guidance loss beside the task loss" in " ".join(capsys.readouterr().out.split())


def test_a_finished_run_guides_the_next(finished: Path, tiny: Path, tmp_path: Path) -> None:
    """A guide trained here is its run folder; another architecture, a cut file and a missing one are refused."""
    twin = "{depth: 3, first_width: 16, width: 16}"
    weights = finished / "guided/target/model.safetensors"
    base = ["train", "--config", str(tiny), "--guide.options", twin]
    own = ["--run_dir", str(tmp_path / "next"), "--guide.weights", str(finished / "guided")]
    assert main([*base, *own]) == 0
    environment = json.loads((tmp_path / "next/environment.json").read_text())
    network = deep_fcn.build(num_classes=5, input_shape=(12, 1, 1), depth=3, first_width=16, width=16)
    network.load_state_dict(load_file(weights))
    assert environment["guide_hash"] == fingerprint(network)


def test_a_guide_that_leaves_fp16_is_refused_before_training(
    finished: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = deep_fcn.build(num_classes=5, input_shape=(12, 1, 1), depth=2, first_width=16, width=8, batch_norm=False)
    large = {name: value * 1e4 for name, value in network.state_dict().items()}
    save_file(large, tmp_path / "large.safetensors")
    options = ["--guide.weights", str(tmp_path / "large.safetensors"), "--run_dir", str(tmp_path / "run")]
    assert main(["train", "--config", str(tiny), *options, "--guide.dtype=fp16"]) == 2
    assert "guide.dtype=fp16: the activations of guide layer 'hidden.1.linear' hold inf" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["train", "--config", str(tiny), *options, "--guide.dtype=bf16"]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.unlink(), "weights.safetensors does not exist. Give a .safetensors, .pt or .pth file"),
        (lambda file: file.write_bytes(file.read_bytes()[:100]), "is not a whole file of weights"),
        (lambda file: None, "fit the guide FCN in 20 tensors: hidden.1.linear.weight is [16, 16], the guide's ["),
    ],
)
def test_weights_that_do_not_fit(
    change: Callable[[Path], None],
    message: str,
    finished: Path,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "weights.safetensors"
    shutil.copy(finished / "guided/target/model.safetensors", file)
    change(file)
    assert (
        main(["train", "--config", str(tiny), "--run_dir", str(tmp_path / "run"), "--guide.weights", str(file)]) == 2
    )
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
