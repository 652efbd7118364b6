"""Images: where they come from, the paper's transforms, and bad data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch.utils.data import DataLoader

from scale_guide.data_order import SeededDataset
from scale_guide.tasks import image_classification

SHARED = Path(__file__).parents[2] / "shared" / "data"
COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
build = image_classification.build


def needs(name: str) -> Any:
    return pytest.mark.skipif(not (SHARED / name).exists(), reason=f"{SHARED / name} is not here")


def mode_of(file: str) -> str:
    with Image.open(file) as image:
        return image.mode


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train/ and val/ with three classes of four and two plain-coloured images."""
    for split, count in (("train", 4), ("val", 2)):
        for name, colour in COLOURS.items():
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 30), colour).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make_table(split: str, **columns: Any) -> datasets.Dataset:
    count = 4 if split == "train" else 3
    images = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(count)]
    features = {"img": datasets.Image(), "labels": datasets.ClassLabel(names=["a", "b", "c"])}
    table = {"img": images, "labels": [i % 3 for i in range(count)]} | columns
    return datasets.Dataset.from_dict(table, features=datasets.Features({k: features[k] for k in table}))


# --- where images come from


def test_digits_are_always_the_same_1400_and_397() -> None:
    task, again = build(), build()
    assert (len(task.train), len(task.validation)) == (1400, 397)
    assert task.facts == {"num_classes": 10, "input_shape": (3, 32, 32)}
    assert torch.equal(task.train[5]["input"], again.train[5]["input"])
    images = [*(task.train[i] for i in range(1400)), *(task.validation[i] for i in range(397))]
    assert len({sample["input"].numpy().tobytes() for sample in images}) == 1797
    counts = torch.bincount(torch.stack([sample["target"] for sample in images]))
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_digits_raw_are_grey_and_within_0_and_1() -> None:
    image = build(normalize=False, image_size=16).train[0]["input"]
    assert image.shape == (3, 16, 16)
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])
    assert image.min() == 0
    assert 0.7 < image.max() <= 1


def test_folder_classes_are_in_alphabetical_order(folder: Path) -> None:
    task = build(data=str(folder), image_size=16, normalize=False)
    assert task.facts == {"num_classes": 3, "input_shape": (3, 16, 16)}
    assert (len(task.train), len(task.validation)) == (12, 6)
    for data in (task.train, task.validation):
        for i in range(len(data)):
            sample = data[i]
            assert sample["input"].mean((1, 2)).argmax() == 2 - sample["target"]  # blue, green, red
            assert sample["weight"] == 1


def test_validation_that_lacks_a_class_keeps_the_numbers(folder: Path) -> None:
    for file in (folder / "val" / "blue").iterdir():
        file.unlink()
    (folder / "val" / "blue").rmdir()
    labels = build(data=str(folder)).validation.source.labels
    assert labels == [1, 1, 2, 2]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_any_mode_of_image_becomes_rgb(folder: Path, mode: str) -> None:
    grey = Image.fromarray(np.full((30, 40), 128, np.uint8))
    image = Image.fromarray(np.full((30, 40), 128 * 257 - 100, np.uint16)) if mode == "I;16" else grey.convert(mode)
    file = folder / "train" / "blue" / ("0.tif" if mode == "CMYK" else "0.png")
    (folder / "train" / "blue" / "0.png").unlink()
    image.save(file)
    sample = build(data=str(folder), image_size=8, normalize=False, augment=False).train[0]
    assert sample["weight"] == 1
    assert sample["input"].shape == (3, 8, 8)
    if mode != "1":
        torch.testing.assert_close(sample["input"], torch.full((3, 8, 8), 128 / 255), atol=0.02, rtol=0)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_tables(tmp_path: Path, kind: str) -> None:
    tables = datasets.DatasetDict({split: make_table(split) for split in ("train", "validation")})
    if kind == "saved":
        tables.save_to_disk(tmp_path / "data")
    else:
        (tmp_path / "data").mkdir()
        for split, table in tables.items():
            table.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    task = build(data=str(tmp_path / "data"), image_size=8, normalize=False, augment=False)
    assert (len(task.train), len(task.validation), task.facts["num_classes"]) == (4, 3, 3)
    samples = [task.train[i] for i in range(4)]
    assert [int(sample["target"]) for sample in samples] == [0, 1, 2, 0]
    assert [round(float(sample["input"][0].mean()) * 255) for sample in samples] == [0, 40, 80, 120]


@needs("cifar10")
@pytest.mark.usefixtures("cache")
def test_real_cifar10() -> None:
    task = build(data=str(SHARED / "cifar10"), image_size=32)
    assert (len(task.train), len(task.validation)) == (20_000, 5_000)
    assert task.facts == {"num_classes": 10, "input_shape": (3, 32, 32)}
    assert torch.bincount(torch.tensor(task.train.source.labels)).tolist() == [2000] * 10
    images = torch.stack([task.validation[i]["input"] for i in range(0, 5000, 10)])
    assert images.mean().abs() < 0.3
    assert 0.8 < images.std() < 1.3


@needs("imagenette")
def test_real_imagenette_with_workers_and_greyscale_files() -> None:
    task = build(data=str(SHARED / "imagenette"), image_size=64)
    assert (len(task.train), len(task.validation), task.facts["num_classes"]) == (1500, 500, 10)
    grey = [i for i in range(1500) if mode_of(task.sample_name(i)) == "L"]
    assert grey
    keys = [(0, i) for i in (*grey, *range(32))]
    data = SeededDataset(task.train, seed=0)
    plain, forked = (
        next(iter(DataLoader(data, sampler=keys, batch_size=99, num_workers=n, collate_fn=task.collate)))
        for n in (0, 2)
    )
    assert torch.equal(plain["input"], forked["input"])
    assert plain["weight"].sum() == len(keys)
    assert not torch.equal(data[0, 3]["input"], data[1, 3]["input"])  # augmented anew in each epoch


# --- the paper's transforms


def test_validation_transform_is_resize_then_centre_crop() -> None:
    image = torch.zeros(3, 256, 512)
    image[:, 16:240, 144:368] = 1  # the centre 224 x 224 where the shorter side is 256
    picture = Image.fromarray((image.permute(1, 2, 0).numpy() * 255).astype(np.uint8))
    assert image_classification.make_transform(224, False, False)(picture).eq(1).all()
    small = image_classification.make_transform(32, False, False)(picture)
    assert small.shape == (3, 32, 32)
    assert small[:, 2:-2, 2:-2].eq(1).all()
    normal = image_classification.make_transform(224, False, True)(picture)[:, 0, 0]
    torch.testing.assert_close(normal, (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225]))


def test_training_transform_crops_and_flips(folder: Path) -> None:
    ramp = np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (64, 1))
    Image.fromarray(ramp).save(folder / "train" / "blue" / "0.png")
    data = SeededDataset(build(data=str(folder), image_size=32, normalize=False).train, seed=0)
    rows = [data[epoch, 0]["input"][0, 16] for epoch in range(40)]
    flipped = sum(bool(row[0] > row[-1]) for row in rows)
    spans = [float(row.max() - row.min()) for row in rows]
    assert 10 < flipped < 30
    assert min(spans) < 0.6
    assert len({round(span, 4) for span in spans}) > 20
    still = SeededDataset(build(data=str(folder), image_size=32, augment=False).train, seed=0)
    assert torch.equal(still[0, 0]["input"], still[1, 0]["input"])


def test_digits_are_augmented_only_when_asked() -> None:
    plain, asked = (SeededDataset(build(augment=augment).train, seed=0) for augment in (None, True))
    assert torch.equal(plain[0, 0]["input"], plain[1, 0]["input"])
    assert not torch.equal(asked[0, 0]["input"], asked[1, 0]["input"])
    assert asked[0, 0]["input"].shape == (3, 32, 32)


# --- bad data


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "gone"])
def test_unreadable_file_is_a_row_of_weight_0(folder: Path, damage: str) -> None:
    task, strict = (build(data=str(folder), image_size=8, strict_data=flag) for flag in (False, True))
    file = folder / "train" / "blue" / "2.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)).save(file)
    whole = file.read_bytes()
    file.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"no image", "empty": b"", "gone": b""}[damage])
    if damage == "gone":
        file.unlink()
    loader = DataLoader(task.train, batch_size=4, num_workers=2, collate_fn=task.collate)  # type: ignore[arg-type]
    batch = next(iter(loader))
    assert batch["weight"].tolist() == [1, 1, 0, 1]
    assert batch["input"][2].eq(0).all()
    assert task.sample_name(2) == str(file)
    with pytest.raises(ValueError, match=r"blue/2.png cannot be read.*strict_data"):
        strict.train[2]


@pytest.mark.usefixtures("cache")
def test_unreadable_row_of_a_table(tmp_path: Path) -> None:
    """Plain Parquet, not written by `datasets`: it says of no column that it holds images or classes."""
    good = make_table("train").cast_column("img", datasets.Image(decode=False))[0]["img"]
    broken = [{"bytes": b"no image", "path": None}, None, {"bytes": None, "path": "/nowhere.png"}]
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    for split, images in (("train", [good, *broken]), ("test", [good])):
        columns = {"image": pyarrow.array(images, kind), "label": list(range(len(images)))}
        parquet.write_table(pyarrow.table(columns), tmp_path / f"{split}.parquet")
    task = build(data=str(tmp_path), image_size=8)
    assert (task.facts["num_classes"], len(task.validation)) == (4, 1)
    assert [float(task.train[i]["weight"]) for i in range(4)] == [1, 0, 0, 0]
    assert [task.sample_name(i) for i in (1, 3)] == ["row 1 of split train", "row 3 of split train (/nowhere.png)"]


def test_folders_that_hold_no_images(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    def error(data: Path, **options: Any) -> str:
        with pytest.raises(ValueError, match=r"task.options.data is ") as caught:
            build(data=str(data), **options)
        assert str(caught.value).startswith(f"task.options.data is {str(data)!r}: ")
        return str(caught.value)

    empty = tmp_path_factory.mktemp("empty")
    assert "no such folder" in error(empty / "missing")
    assert "the folder is empty" in error(empty)
    assert "it must be a folder" in error(folder / "train" / "red" / "0.png")
    assert "no split 'train', only: blue, green, red" in error(folder / "train")
    assert "no split 'valid' (did you mean 'val'?), only: train, val" in error(folder, validation_split="valid")
    assert "has no columns" in error(folder, image_column="image")
    (folder / "val" / "pink").mkdir()
    assert "has classes that" in error(folder)
    assert "pink" in error(folder)
    (folder / "train" / "pink").mkdir()
    assert f"{folder / 'train' / 'pink'} holds no image file" in error(folder)
    (empty / "train").mkdir()
    assert "no split validation or valid or val or test, only: train" in error(empty)
    (empty / "val").mkdir()
    assert "has no class folders" in error(empty)


def test_names_that_are_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"data is 'digit': no such folder \(did you mean 'digits'\?\)"):
        build(data="digit")
    with pytest.raises(ValueError, match="data is '': no such folder"):
        build(data="")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"data is 'nobody/nothing': no such folder here, and the hub did not give"):
        build(data="nobody/nothing")


def test_options_that_digits_do_not_have() -> None:
    with pytest.raises(ValueError, match=r"digits.*own two splits.*remove train_split"):
        build(label_column="label")
    with pytest.raises(ValueError, match="image_size is 0"):
        build(image_size=0)


@pytest.mark.usefixtures("cache")
def test_columns_and_labels_of_tables(tmp_path: Path) -> None:
    def error(train: datasets.Dataset, test: datasets.Dataset | None = None, **options: Any) -> str:
        folder = tmp_path / f"data{len(list(tmp_path.iterdir()))}"
        datasets.DatasetDict(train=train, test=test or make_table("test")).save_to_disk(folder)
        with pytest.raises(ValueError, match=r"task.options.data is ") as caught:
            build(data=str(folder), **options)
        return str(caught.value)

    table = make_table("train")
    odd = table.remove_columns("img").add_column("pixels", [1, 2, 3, 4])
    assert "set task.options.image_column to one of its columns: labels, pixels" in error(odd)
    assert "its label column is not 'x'" in error(table, label_column="x")
    words = table.remove_columns("labels").add_column("labels", list("abcd"))
    assert "holds 'a': labels must be class numbers" in error(words)
    other = make_table("test").rename_column("labels", "tags")
    assert "split test lacks column 'labels'" in error(table, other)
    assert "it has: img, tags" in error(table, other)
    hidden = table.cast_column("labels", datasets.Value("int64")).map(
        lambda row, i: {"labels": i - 1}, with_indices=True
    )
    assert "labels of split train must lie in 0..2, but some are [-1]" in error(hidden)
    numbers = table.cast_column("labels", datasets.Value("int64")).map(lambda row: {"labels": 0})
    assert "labels of split test must lie in 0..0, but some are [1, 2]" in error(numbers)
    assert "its files cannot be read" in error(table.select([]))
