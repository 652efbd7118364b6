"""Every shipped recipe runs: on small data of its kind in the default suite, on the real data where it is at hand."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import ClassLabel as Label
from datasets import Dataset, DatasetDict, Features, Image
from launching import ROOT, finish, start
from PIL import Image as Picture

from scale_guide.__main__ import COMMANDS, main
from scale_guide.lookup import PACKAGE
from scale_guide.tracking import read_metrics, read_summary

DATA = ROOT.parent / "shared" / "data"
FOLDER = PACKAGE / "recipes"
FILES = [path for path in FOLDER.rglob("*.yaml") if path.parent.name != "flavours"]
RECIPES = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FILES)


def words(folder: Path) -> str:
    generator = np.random.default_rng(0)
    for name, num_lines in (("train.txt", 600), ("valid.txt", 60)):
        lines = (" ".join(f"w{i}" for i in generator.integers(50, size=12)) for _ in range(num_lines))
        (folder / name).write_text("\n".join(lines) + "\n")
    return str(folder)


def images(folder: Path) -> str:
    generator = np.random.default_rng(0)
    splits = {}
    for split, count in (("train", 40), ("test", 12)):
        pixels = generator.integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
        columns = {"img": [Picture.fromarray(p) for p in pixels], "label": [i % 3 for i in range(count)]}
        splits[split] = Dataset.from_dict(columns, features=Features({"img": Image(), "label": Label(num_classes=3)}))
    DatasetDict(splits).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


SMALL = ["--training.num_workers=0", "--training.epochs=null", "--training.steps=2", "--training.log_every=1"]
NARROW = ["--training.batch_size=8", "--target.options.first_width=32", "--target.options.width=16"]
# Trained weights of ImageNet are fetched from elsewhere, and guides trained alone do not shrink with the target.
IMAGENET = ["--task.options={{data: {images}, image_size: 32}}", "--only=unguided,untrained_guide"]
SEQUENCES = ["--training.batch_size=8"]
WORDS = ["--task.options={{data: {words}, context_length: 20}}", *SEQUENCES]
GENERATED = ["--task.options.num_train=300", "--task.options.num_validation=20"]
OPTIONS = {
    "effective_batch": [
        "--only=64_unguided,64_micro_batch,1024_exact",
        *NARROW[1:],
        "--target.options.depth=2",
        "--guide.name=deep_fcn",
        "--guide.options.depth=2",
    ],
    "quickstart": [],
    "small/copy_paste": GENERATED,
    "small/language_model": ["--task.options.data={words}"],
    "small/parity": GENERATED,
    "small/deep_fcn": ["--task.options.data={images}", *NARROW],
    "small/wide_fcn": ["--task.options.data={images}", NARROW[0], "--target.options.width=16"],
    "small/deep_convnet": ["--task.options.data={images}", NARROW[0]],
    "imagenet/deep_fcn": [*IMAGENET, *NARROW, "--target.options.depth=3"],
    "imagenet/wide_fcn": [*IMAGENET, NARROW[0], "--target.options.width=16"],
    "imagenet/deep_convnet": [*IMAGENET, NARROW[0], "--target.options.width_per_group=8"],
    "sequences/copy_paste": [*GENERATED, *SEQUENCES, "--task.options.max_length=24"],
    "sequences/parity": [*GENERATED, *SEQUENCES],
    "sequences/language_model": WORDS,
    "sequences/language_model_large": WORDS,
    "sequences/openwebtext_349m": [*WORDS, "--target.options.embedding=32", "--target.options.hidden=32"],
    "sequences/openwebtext_764m": [*WORDS, "--target.options.embedding=32", "--target.options.hidden=32"],
}


def short_guides(recipe: str) -> list[str]:
    """The variants of a recipe as an option, those with a number of steps of their own at two."""
    found = yaml.safe_load((FOLDER / f"{recipe}.yaml").read_text()).get("variants", {})
    short = {name: fields | {"training.steps": 2} for name, fields in found.items() if "training.steps" in fields}
    return [f"--variants={json.dumps(found | short)}"] if short else []


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_trains(recipe: str, tmp_path: Path) -> None:
    made = {"words": words(tmp_path), "images": images(tmp_path)}
    given = [option.format(**made) for option in OPTIONS[recipe]]
    run = tmp_path / "run"
    assert main(["train", "--config", recipe, "--run_dir", str(run), *SMALL, *given, *short_guides(recipe)]) == 0
    folders = [p.parent for p in run.rglob("summary.json")]
    assert folders
    for folder in folders:
        summary = read_summary(folder)
        assert summary is not None
        assert summary["step"] == 2
        losses = [line["task_loss"] for line in read_metrics(folder) if "task_loss" in line]
        assert np.isfinite(losses).all()
    guided = [line for folder in folders for line in read_metrics(folder) if "pairs" in line]
    assert guided
    assert all(np.isfinite([p["similarity"] for p in line["pairs"].values()]).all() for line in guided)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_opens_with_command_hardware_time_and_expected_result(recipe: str) -> None:
    head = (FOLDER / f"{recipe}.yaml").read_text().partition("\ntask:")[0]
    assert head.startswith("# accelerate launch --config_file accelerate_configs/")
    assert f"--config {recipe}" in head
    for word in ("What:", "Hardware:", "Time:", "Expected:"):
        assert f"# {word}" in head


def launch(engine: str, run: Path, *options: str) -> dict[str, object]:
    """One launch on two processes; the summary of its only run."""
    finish(start(engine, "-m", "scale_guide", "train", "--run_dir", str(run), *options))
    facts = json.loads(next(run.rglob("environment.json")).read_text())
    assert facts["world_size"] == 2
    expected = {"cpu": "DDP"}.get(engine, engine.replace("zero", "ZeRO-"))
    assert facts["engine"] == expected
    summary = read_summary(next(run.rglob("summary.json")).parent)
    assert summary is not None
    return summary


def needs(folder: str) -> str:
    if not (DATA / folder).exists():
        pytest.skip(f"the real data {folder} is not beside the repository")
    return str(DATA / folder)


def first_guided_losses(run: Path) -> list[float]:
    lines = read_metrics(next(run.rglob("metrics.jsonl")).parent)
    return [line[name] for line in lines if "guidance_loss" in line for name in ("task_loss", "guidance_loss")]


@pytest.mark.slow
def test_language_model_on_wikitext_under_ddp_and_zero3(tmp_path: Path) -> None:
    options = ["--config", "small/language_model", f"--task.options.data={needs('wikitext-2')}"]
    options += ["--only=untrained_guide", "--training.steps=4", "--training.log_every=1"]
    losses = []
    for engine in ("cpu", "zero3"):
        summary = launch(engine, tmp_path / engine, *options)
        assert summary["validation"]["word_perplexity"] < 5100  # type: ignore[index]
        losses.append(first_guided_losses(tmp_path / engine))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["cpu", "zero2"])
def test_images_from_parquet_and_from_folders(engine: str, tmp_path: Path) -> None:
    alone = ["--only=untrained_guide"]
    few = ["--training.epochs=null", "--training.steps=2", "--training.log_every=1", "--training.batch_size=64"]
    cifar = ["--config", "small/deep_fcn", f"--task.options.data={needs('cifar10')}", *few, *alone]
    assert launch(engine, tmp_path / "cifar", *cifar, "--target.options.first_width=64")["num_unreadable"] == 0
    # 500 validation images of 224 x 224, some of them greyscale.
    folder = f"--task.options={{data: {needs('imagenette')}, image_size: 64}}"
    imagenette = ["--config", "small/deep_fcn", folder, *few, *alone, "--target.options.first_width=64"]
    summary = launch(engine, tmp_path / "imagenette", *imagenette)
    assert summary["num_unreadable"] == 0
    assert summary["validation"]["loss"] > 0  # type: ignore[index]


def test_a_broken_image_is_named_in_the_summary_and_has_no_part(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for label in ("cat", "dog"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Picture.fromarray(generator.integers(256, size=(20, 20, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "data/train/dog/3.png").write_bytes(b"no image at all")
    options = ["--config", "small/deep_fcn", f"--task.options.data={tmp_path / 'data'}", *SMALL, *NARROW]
    options += ["--training.batch_size=12", "--only=unguided"]
    assert main(["train", "--run_dir", str(tmp_path / "run"), *options]) == 0
    summary = read_summary(tmp_path / "run/unguided")
    assert summary is not None
    assert summary["num_unreadable"] == 1
    assert summary["unreadable"][0].endswith("train/dog/3.png")
    with pytest.raises(ValueError, match=r"dog/3\.png"):
        main(["train", "--run_dir", str(tmp_path / "strict"), *options, "--task.options.strict_data=true"])


def readme_programs() -> list[list[str]]:
    """The arguments of every scale-guide command in the README, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    lines = [line.partition("#")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    programs = [shlex.split(part) for line in lines for part in line.split("&&")]
    starts = ("scale-guide", "scale_guide")
    return [words[i + 1 :] for words in programs for i, word in enumerate(words) if word in starts]


def test_every_command_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As written, in the order of the README; only the data and, for training, the size are this test's own."""
    monkeypatch.chdir(tmp_path)
    data = images(tmp_path)
    programs = readme_programs()
    assert {words[0] for words in programs} == set(COMMANDS)
    for words in programs:
        given = [data if word == "PATH" else word for word in words]
        if given[0] == "train":
            given += [*SMALL, *(NARROW if "small/deep_fcn" in given else []), "--training.micro_batch_size=null"]
        assert main(given) == 0, given
