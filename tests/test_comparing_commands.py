"""scale-guide similarity and consistency: what they print, write and refuse, alone and on two processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
import yaml
from launching import finish, start
from safetensors.torch import load_file

from scale_guide.__main__ import main
from scale_guide.analysis.error_consistency import error_consistency
from scale_guide.models import deep_fcn

TINY = {
    "task": {"name": "toy:build"},
    "target": {"name": "deep_fcn", "options": {"depth": 3, "first_width": 16, "width": 16}},
    "guide": {"name": "deep_fcn", "options": {"depth": 2, "first_width": 16, "width": 8, "batch_norm": False}},
    "training": {"batch_size": 32, "steps": 40, "num_workers": 0},
    "optimizer": {"lr": 0.01},
    "variants": {"unguided": {"guidance.weight": 0}, "guided": {}},
}
TARGET = ["hidden.0.linear", "hidden.1.linear", "hidden.2.linear"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two finished runs, unguided and guided."""
    folder = tmp_path_factory.mktemp("comparing")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    assert main(["train", "--config", str(folder / "tiny.yaml"), "--run_dir", str(folder / "runs")]) == 0
    return folder / "runs"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def target(run: Path) -> Any:
    network = deep_fcn.build(num_classes=5, input_shape=(12, 1, 1), depth=3, first_width=16, width=16)
    network.load_state_dict(load_file(run / "target/model.safetensors"))
    return network.eval()


def test_a_run_alone_is_its_target_before_and_after_against_its_guide(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs / "guided"
    assert main(["similarity", str(run), "--batch_size=19", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    maps = read(run / "maps.json")
    assert maps["target_layers"] == TARGET
    assert maps["guide_layers"] == TARGET[:2]
    assert maps["num_rows"] == 37
    for when in ("before", "after"):
        assert [len(row) for row in maps[when]] == [2, 2, 2]
        assert all(0 < value <= 1 for row in maps[when] for value in row)
    assert maps["before"] != maps["after"]
    assert {name: len(values) for name, values in maps["intrinsic_dimension"].items()} == {
        "target before": 3,
        "target after": 3,
        "guide": 2,
    }
    assert "| hidden.2.linear |" in printed
    assert "Debiased CKA over 37 samples" in printed
    for kind in ("png", "svg"):
        assert (tmp_path / f"similarity.{kind}").stat().st_size > 5000
    assert main(["similarity", str(runs / "unguided"), "--batch_size=19"]) == 0
    control = read(runs / "unguided/maps.json")
    assert (runs / "unguided/similarity.png").exists()
    torch.testing.assert_close(torch.tensor(control["before"]), torch.tensor(maps["before"]))
    assert sum(map(sum, maps["after"])) > sum(map(sum, control["after"])), "the guide has pulled"


def test_two_networks(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run against a model that is given its weights: the same network, so the diagonal is one."""
    monkeypatch.chdir(tmp_path)
    assert main(["similarity", str(runs / "guided"), str(runs / "unguided")]) == 0
    found = read(tmp_path / "similarity/similarity.json")
    assert list(found["layers"]) == ["guided", "unguided"]
    assert min(found["cka"][i][i] for i in range(3)) < 0.999
    model = f"test_comparing_commands:target_like={runs / 'guided'}"
    assert main(["similarity", str(runs / "guided"), model, "--layers", "hidden.*.linear,*.relu", "--out=other"]) == 0
    found = read(tmp_path / "other/similarity.json")
    assert len(found["layers"]["guided"]) == 6
    assert [found["cka"][i][i] for i in range(6)] == pytest.approx([1] * 6, abs=1e-5)


def target_like() -> Any:
    """A model as a user names it, package.module:callable."""
    return deep_fcn.build(num_classes=5, input_shape=(12, 1, 1), depth=3, first_width=16, width=16)


def test_consistency(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Accuracies are those of the summaries, and kappa is that of the literal answers."""
    names = ["unguided", "guided"]
    words = [str(runs / name) for name in names]
    assert main(["consistency", *words, "test_comparing_commands:target_like", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    found = read(tmp_path / "consistency.json")
    assert found["num_rows"] == 37
    assert list(found["accuracies"]) == [*names, "test_comparing_commands:target_like"]
    for name in names:
        summary = read(runs / name / "summary.json")["validation"]
        assert found["accuracies"][name] == pytest.approx(summary["accuracy"])
    import toy

    data = toy.build().validation
    correct = [target(runs / name)(data.inputs).argmax(1) == data.targets for name in names]
    kappa = error_consistency(*correct)
    assert found["consistency"][0][1] == found["consistency"][1][0] == found["pairs"][0]["kappa"] == kappa
    assert [found["consistency"][i][i] for i in range(3)] == [1, 1, 1]
    low, high = found["pairs"][0]["bounds"]
    assert low <= found["pairs"][0]["interval"][0] <= kappa <= found["pairs"][0]["interval"][1]
    assert low <= kappa <= high
    assert f"| unguided | guided                              | {kappa:.3f} " in printed
    picture = matplotlib.image.imread(tmp_path / "consistency.png")
    assert picture.std() > 0.1, "something is drawn"


@pytest.mark.parametrize("command", ["similarity", "consistency"])
def test_two_processes_give_what_one_gives(command: str, runs: Path, tmp_path: Path) -> None:
    """37 samples in batches of 8: three on one rank, two on the other."""
    options = [command, str(runs / "guided"), str(runs / "unguided"), "--batch_size=8"]
    launch = start("cpu", "-m", "scale_guide", *options, "--out", str(tmp_path / "two"))
    assert main([*options, "--out", str(tmp_path / "one")]) == 0
    assert finish(launch).count("over 37 samples") == 1, "one rank prints"
    one, two = (read(tmp_path / folder / f"{command}.json") for folder in ("one", "two"))
    if command == "consistency":
        assert one == two
        return
    assert (one["layers"], one["num_rows"], one["num_points"]) == (two["layers"], two["num_rows"], two["num_points"])
    torch.testing.assert_close(torch.tensor(two["cka"]), torch.tensor(one["cka"]), atol=1e-6, rtol=0)
    for name, values in one["intrinsic_dimension"].items():
        assert two["intrinsic_dimension"][name] == pytest.approx(values, rel=1e-6)


def test_an_unfinished_run_has_its_newest_checkpoint(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = ["consistency", str(runs / "guided"), str(runs / "unguided"), "--out", str(tmp_path)]
    assert main(expected) == 0
    before = read(tmp_path / "consistency.json")
    (runs / "guided/summary.json").rename(runs / "guided/summary.kept")
    try:
        assert main(expected) == 0
    finally:
        (runs / "guided/summary.kept").rename(runs / "guided/summary.json")
    assert read(tmp_path / "consistency.json") == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["similarity"], "networks"),
        (["similarity", "deep_fnc"], "'deep_fnc' is no run folder (no config.yaml in it) and no model (did you mean"),
        (["similarity", "RUNS"], "holds several runs: give one of"),
        (["similarity", "GUIDED", "--lyers=weights"], "--lyers is not an option (did you mean 'layers'?)"),
        (["similarity", "GUIDED", "--layers=hiden.0.linear"], "did you mean 'hidden.0.linear'?"),
        (["similarity", "GUIDED", "--rows=many"], "rows"),
        (["similarity", "GUIDED", "--rows=3"], "--rows: 3 samples are too few"),
        (["similarity", "GUIDED", "--task.name=image_clasification"], "did you mean 'image_classification'?"),
        (["similarity", "GUIDED", "--data=x"], "'data' is not known"),
        (["similarity", "GUIDED", "GUIDED", "deep_fcn"], "similarity compares one or two networks, not 3"),
        (["similarity", "torchvision.models:resnet1"], "did you mean 'resnet18'?"),
        (["similarity", "deep_fcn=nowhere.pt"], "deep_fcn=nowhere.pt: guide.weights='nowhere.pt'"),
        (["similarity", "GUIDED", "torchvision.models:resnet18"], "resnet18 cannot read the samples of this task"),
        (["consistency", "GUIDED"], "consistency compares different networks"),
        (["consistency", "GUIDED", "GUIDED"], "consistency compares different networks"),
        (["consistency", "GUIDED", "UNGUIDED", "--task.name=copy_paste"], "CopyPaste has no answer per sample"),
        (["consistency", "EMPTY", "deep_fcn"], "holds neither finished weights nor a whole checkpoint yet"),
    ],
)
def test_mistakes(
    arguments: list[str], told: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit code 2, nothing written."""
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text((runs / "guided/config.yaml").read_text())
    places = {
        "RUNS": str(runs),
        "GUIDED": str(runs / "guided"),
        "UNGUIDED": str(runs / "unguided"),
        "EMPTY": str(empty),
    }
    assert main([places.get(word, word) for word in arguments] + ["--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_runs_of_one_name_are_told_apart(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "again").symlink_to(runs)
    out = str(tmp_path / "out")
    assert main(["consistency", str(runs / "guided"), str(tmp_path / "again/guided"), "--out", out]) == 0
    found = read(tmp_path / "out/consistency.json")
    assert list(found["accuracies"]) == ["runs/guided", "again/guided"]
    assert found["consistency"] == [[1, 1], [1, 1]]
