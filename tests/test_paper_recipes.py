"""The paper's rows at paper size: layers, pairs and plans, on meta tensors and small data."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_recipes import images, words

from scale_guide.__main__ import main

IMAGENET = ["deep_fcn", "wide_fcn", "deep_convnet"]
SEQUENCES = ["copy_paste", "parity", "language_model", "language_model_large", "openwebtext_349m", "openwebtext_764m"]


def layers(recipe: str, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, int, int]:
    """Returns how many target layers, guide layers and pairs `scale-guide layers` lists."""
    assert main(["layers", "--config", recipe, *options]) == 0
    tables = re.split(r"^(?:guide|pairs) .*$", capsys.readouterr().out, flags=re.MULTILINE)
    target, guide, pairs = (len(re.findall(r"^\| \d+ +\|", table, flags=re.MULTILINE)) for table in tables)
    return target, guide, pairs


@pytest.mark.parametrize(
    ("recipe", "num_target", "num_guide", "num_summed"),
    [("deep_fcn", 48, 21, 21), ("wide_fcn", 3, 21, 3), ("deep_convnet", 50, 54, 50)],
)
def test_layers_of_the_released_code(
    recipe: str, num_target: int, num_guide: int, num_summed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PAPER.md section 3: guide layers, target layers, pairs, and how many terms the released code sums."""
    given = ["--config", "as_released", f"--task.options.data={images(tmp_path)}"]
    name = f"imagenet/{recipe}"
    assert layers(name, capsys, *given, "--guidance.collision=sum") == (num_target, num_guide, num_guide)
    assert layers(name, capsys, *given) == (num_target, num_guide, num_summed)


@pytest.mark.parametrize("recipe", [f"imagenet/{name}" for name in IMAGENET])
def test_plan_of_an_image_recipe(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"--task.options.data={images(tmp_path)}", "--num_processes=8", "--training.micro_batch_size=16"]
    assert main(["plan", "--config", recipe, *given]) == 0
    assert "256 rows = 8 processes x 2 micro-batches x 16" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", [f"sequences/{name}" for name in SEQUENCES])
def test_plan_of_a_sequence_recipe(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"--task.options={{data: {words(tmp_path)}, context_length: 75}}"
    given = [] if recipe.split("/")[1] in ("copy_paste", "parity") else [text]
    assert main(["plan", "--config", recipe, "--num_processes=8", *given]) == 0
    assert "256 rows = 8 processes x 32" in capsys.readouterr().out


def test_the_papers_targets_have_the_stated_numbers_of_parameters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """360 M, 1.376 billion and 22.8 M at 1,000 classes; the data here have 3."""
    stated = {"deep_fcn": (360e6, 1024), "wide_fcn": (1.376e9, 8192), "deep_convnet": (22.8e6, 2048)}
    data = images(tmp_path)
    for recipe, (number, width) in stated.items():
        assert main(["layers", "--config", f"imagenet/{recipe}", f"--task.options.data={data}"]) == 0
        found = re.search(r"^target \S+, ([\d,]+) parameters", capsys.readouterr().out, flags=re.MULTILINE)
        assert found
        assert int(found[1].replace(",", "")) + 997 * (width + 1) == pytest.approx(number, rel=0.002)
