"""Where images come from: an image folder, a Parquet or `datasets` folder, the hub; and how they are decoded."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from scale_guide.lookup import closest

VALIDATION_SPLITS = ("validation", "valid", "val", "test")


class Unreadable(Exception):
    """An image that is missing, truncated or no image at all."""


class ImageSource(Protocol):
    """One split: images by number, with their labels."""

    labels: list[int]

    def read(self, index: int) -> Any:
        """RGB image number `index`; raises Unreadable."""
        ...

    def name(self, index: int) -> str:
        """What to call image number `index` in a message: its file, or its row."""
        ...


class FolderImages:
    """Images that are files of class folders."""

    def __init__(self, files: list[tuple[str, int]]) -> None:
        self.files = [file for file, _ in files]
        self.labels = [label for _, label in files]

    def read(self, index: int) -> Image.Image:
        """RGB image number `index`; raises Unreadable."""
        return _decode(self.files[index])

    def name(self, index: int) -> str:
        """Path of the file."""
        return self.files[index]


class TableImages:
    """Images of a column of a `datasets` table, kept encoded until read, so that one broken image harms no other."""

    def __init__(self, table: datasets.Dataset, columns: tuple[str, str], split: str) -> None:
        self.image, label = columns
        self.labels: list[int] = list(table[label])
        self.table = table.select_columns([self.image]).cast_column(self.image, datasets.Image(decode=False))
        self.split = split

    def read(self, index: int) -> Image.Image:
        """RGB image number `index`; raises Unreadable."""
        item = self.table[index][self.image]
        if not item or not (item["bytes"] or item["path"]):
            raise Unreadable("no image")
        return _decode(io.BytesIO(item["bytes"]) if item["bytes"] else item["path"])

    def name(self, index: int) -> str:
        """Row and split, and the path that the table gives, if any."""
        path = (self.table[index][self.image] or {}).get("path")
        return f"row {index} of split {self.split}" + (f" ({path})" if path else "")


def open_images(
    data: str, splits: tuple[str, str | None], columns: tuple[str | None, str | None]
) -> tuple[ImageSource, ImageSource, int]:
    """Training images, validation images and number of classes, of the folder or hub dataset `data`.

    `splits` are the wanted names of the two splits and `columns` those of image and label; None finds the usual names.

    Raises:
        ValueError: nothing there, a split or column missing or empty, or labels that are no class numbers.
    """
    folder = Path(data).expanduser()
    if data and folder.exists():
        kind = _kind(data, folder)
        if kind == "classes":
            if any(columns):
                raise _error(data, "a folder of image files has no columns", "remove image_column and label_column")
            return _open_folder(data, folder, splits)
        tables = _load_tables(data, folder, kind)
    else:
        tables = _load_hub(data)
    train = _pick(data, tables, splits[0], ("train",))
    validation = _pick(data, tables, splits[1], VALIDATION_SPLITS)
    names = _find_columns(data, tables[train].features, columns)
    lacking = [name for name in names if name not in tables[validation].features]
    if lacking:
        fix = f"give it the columns of split {train}; it has: {', '.join(tables[validation].features)}"
        raise _error(data, f"split {validation} lacks column {lacking[0]!r}", fix)
    sources = [TableImages(tables[split], names, split) for split in (train, validation)]
    feature = tables[train].features[names[1]]
    known = feature.num_classes if isinstance(feature, datasets.ClassLabel) else None
    return sources[0], sources[1], _count_classes(data, sources, names[1], known)


def _error(data: str, rule: str, fix: str) -> ValueError:
    return ValueError(f"task.options.data is {data!r}: {rule}; {fix}")


def _kind(data: str, folder: Path) -> str:
    """What an existing folder holds: classes | saved | parquet."""
    if not folder.is_dir():
        raise _error(data, "it must be a folder, not a file", "give the folder that holds the splits")
    if not any(folder.iterdir()):
        raise _error(data, "the folder is empty", "give a folder that holds images or Parquet files")
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return "saved"
    if next(folder.rglob("*.parquet"), None):
        return "parquet"
    return "classes"


def _load_tables(data: str, folder: Path, kind: str) -> datasets.DatasetDict:
    """All splits of a local folder of Parquet files, or of one written by `save_to_disk`."""
    try:
        if kind == "parquet":
            return datasets.load_dataset("parquet", data_dir=str(folder))
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, IndexError, datasets.exceptions.DatasetsError) as error:  # IndexError: an empty split
        raise _error(data, f"its files cannot be read ({error})", "write or copy the folder anew") from error
    return saved if isinstance(saved, datasets.DatasetDict) else datasets.DatasetDict(train=saved)


def _load_hub(data: str) -> datasets.DatasetDict:
    """All splits of a dataset of the Hugging Face hub."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", data) or data.startswith("."):
        hint = closest(data, ["digits"])
        raise _error(
            data,
            f"no such folder{hint}",
            "give digits, an existing folder (--task.options.data PATH), or a dataset of the hub as owner/name",
        )
    try:
        return datasets.load_dataset(data)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise _error(
            data,
            f"no such folder here, and the hub did not give a dataset of that name ({error})",
            "check the spelling and the network, log in with `hf auth login` if it is gated, or give a local folder",
        ) from error


def _pick(data: str, splits: Iterable[str], wanted: str | None, usual: tuple[str, ...]) -> str:
    """Name of the split to use: the wanted one, or the first of the usual ones that is there."""
    found = sorted(splits)
    for name in (wanted,) if wanted else usual:
        if name in found:
            return name
    rule = f"it has no split {wanted!r}{closest(wanted, found)}" if wanted else f"it has no split {' or '.join(usual)}"
    raise _error(
        data,
        f"{rule}, only: {', '.join(found) or 'none'}",
        "add that split, or name one with task.options.train_split or task.options.validation_split",
    )


def _open_folder(data: str, folder: Path, splits: tuple[str, str | None]) -> tuple[ImageSource, ImageSource, int]:
    """The two splits of a folder of class folders; the training split says which classes there are."""
    found = _subfolders(folder)
    train = folder / _pick(data, found, splits[0], ("train",))
    validation = folder / _pick(data, found, splits[1], VALIDATION_SPLITS)
    classes = _subfolders(train)
    if not classes:
        raise _error(data, f"{train} has no class folders", "put the images of each class in a folder of its own")
    strange = sorted(set(_subfolders(validation)) - set(classes))
    if strange:
        raise _error(
            data, f"{validation} has classes that {train} has not: {', '.join(strange)}", "give both the same classes"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    files = [make_dataset(str(split), numbers, IMG_EXTENSIONS, allow_empty=True) for split in (train, validation)]
    bare = sorted(set(classes) - {classes[label] for _, label in files[0]})
    if bare or not files[1]:
        where = train / bare[0] if bare else validation
        raise _error(data, f"{where} holds no image file", f"known endings: {' '.join(IMG_EXTENSIONS)}")
    return FolderImages(files[0]), FolderImages(files[1]), len(classes)


def _subfolders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _find_columns(data: str, features: datasets.Features, wanted: tuple[str | None, str | None]) -> tuple[str, str]:
    """Names of the image column and of the label column: the wanted, the only one of its type, or the usual names."""
    usual = (("image", datasets.Image, ("image", "img")), ("label", datasets.ClassLabel, ("label", "labels")))
    found = []
    for (what, kind, names), name in zip(usual, wanted, strict=True):
        typed = [column for column, feature in features.items() if isinstance(feature, kind)]
        named = [column for column in names if column in features]
        choice = [name] if name else typed if len(typed) == 1 else named
        if not choice or choice[0] not in features:
            raise _error(
                data,
                f"its {what} column is not {name!r}" if name else f"its {what} column is not plain",
                f"set task.options.{what}_column to one of its columns: {', '.join(features)}",
            )
        found.append(choice[0])
    return found[0], found[1]


def _count_classes(data: str, sources: list[TableImages], column: str, known: int | None) -> int:
    """Number of classes: as declared, or the largest training label + 1; checks every label against it."""
    for source in sources:
        if not source.labels:
            raise _error(data, f"its split {source.split} is empty", "give a split that holds images")
        odd = next((label for label in source.labels if not isinstance(label, int)), 0)
        if not isinstance(odd, int):
            raise _error(
                data,
                f"column {column!r} of split {source.split} holds {odd!r}: labels must be class numbers",
                f"name another column with task.options.label_column, or convert it: "
                f"dataset.class_encode_column({column!r})",
            )
    count: int = known or max(sources[0].labels) + 1
    for source in sources:
        outside = sorted({label for label in source.labels if not 0 <= label < count})
        if outside:
            raise _error(
                data,
                f"labels of split {source.split} must lie in 0..{count - 1}, but some are {outside[:5]}",
                "correct them, or choose another split (hidden test labels are often -1)",
            )
    return count


def _decode(file: str | io.BytesIO) -> Image.Image:
    """RGB image of a file of any mode (greyscale, palette, CMYK, alpha, 16 bits); raises Unreadable."""
    try:
        with Image.open(file) as opened:
            opened.load()
            image: Image.Image = opened
            if image.mode.startswith("I;16"):  # convert would clip 16 bits to 255 instead of scaling them
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            return image.convert("RGB")
    except (
        OSError,
        SyntaxError,  # a broken PNG
        ValueError,
        TypeError,
        IndexError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        raise Unreadable(str(error)) from error
