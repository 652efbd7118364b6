"""Where text comes from: text files, tables that `datasets` can read, or data sets of the hub, streamed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import datasets

from scale_guide.lookup import closest

SUFFIXES = (".txt", ".tokens")
TABLE_SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".arrow")
VALIDATION_SPLITS = ("validation", "valid", "val", "dev", "test")
HELD_OUT_LINES = 0.1  # of a single text file: its last lines
HELD_OUT_DOCUMENTS = 1_000  # of a data set without a validation split: its first documents
ROWS_AT_ONCE = 1_000
HUB_NAME = r"(?P<path>[\w][\w.-]*/[\w][\w.-]*)(:(?P<config>[\w.-]+))?"
# What `datasets` raises for data that it cannot reach or read; RuntimeError: a data set that is a program.
READ_ERRORS = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)


def data_error(data: str, rule: str, fix: str) -> ValueError:
    """The error for text that cannot be used."""
    return ValueError(f"task.options.data is {data!r}: {rule}; {fix}")


class Lines:
    """The lines of some files from number `start` up to `stop`, without line ends; read anew by each pass."""

    def __init__(self, files: list[Path], start: int = 0, stop: int | None = None) -> None:
        self.files = files
        self.start = start
        self.stop = stop

    def __iter__(self) -> Iterator[str]:
        return islice(self._all(), self.start, self.stop)

    def _all(self) -> Iterator[str]:
        for file in self.files:
            try:
                with file.open(encoding="utf-8-sig") as text:
                    for line in text:
                        yield line.rstrip("\n")
            except UnicodeDecodeError as error:
                raise data_error(str(file), f"it is not UTF-8 text ({error})", "convert it to UTF-8") from error
            except OSError as error:
                raise data_error(str(file), f"it cannot be read ({error})", "make it readable") from error


@dataclass(frozen=True)
class Documents:
    """The lines of the documents in one column of a `datasets` split, one after another; read anew by each pass.

    A document without a text (None) is left out. A document's last line end only parts it from the next one.
    """

    data: str
    rows: datasets.IterableDataset
    column: str

    def columns(self) -> list[str]:
        """Names of the split's columns, read from its first row where they are not declared."""
        try:
            return self.rows.column_names or list(next(iter(self.rows), {self.column: None}))
        except READ_ERRORS as error:
            raise self._unreadable(error) from error

    def __iter__(self) -> Iterator[str]:
        for text in self._texts():
            if isinstance(text, str):
                yield from text.removesuffix("\n").split("\n")
            elif text is not None:
                raise data_error(
                    self.data,
                    f"column {self.column!r} holds {type(text).__name__}, not text",
                    "name the column that holds the text with task.options.text_column",
                )

    def _texts(self) -> Iterator[Any]:
        try:
            for batch in self.rows.select_columns([self.column]).iter(batch_size=ROWS_AT_ONCE):
                yield from batch[self.column]
        except READ_ERRORS as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> ValueError:
        return data_error(
            self.data, f"its rows cannot be read ({error})", "check the files, or the network, and start again"
        )


class Source(Protocol):
    """Text that has been named, but not opened."""

    def identity(self) -> dict[str, Any]:
        """What tells this text from any other, for JSON."""
        ...

    def open(self) -> tuple[Iterable[str], Iterable[str]]:
        """Lines of the training text and of the validation text; each may be read many times."""
        ...


@dataclass(frozen=True)
class TextFiles:
    """Plain text files: one whose last tenth of lines validates, or a folder with files of both splits.

    In a folder, files belong to a split by a word of their path: train.txt, wiki.valid.tokens, test/part-1.txt.
    """

    data: str
    path: Path

    def identity(self) -> dict[str, Any]:
        """Paths, sizes and times of the files used."""
        return {"text": [_stamps(files) for files in self._splits()]}

    def open(self) -> tuple[Lines, Lines]:
        """Training and validation lines."""
        train, validation = self._splits()
        if validation:
            return Lines(train), Lines(validation)
        num_lines = sum(1 for _ in Lines(train))
        stop = max(0, num_lines - max(1, round(num_lines * HELD_OUT_LINES)))
        return Lines(train, 0, stop), Lines(train, stop)

    def _splits(self) -> tuple[list[Path], list[Path]]:
        """Training and validation files of a folder; the file itself, and none."""
        if self.path.is_file():
            return [self.path], []
        files = _text_files(self.path)
        found: list[list[Path]] = []
        for names in (("train",), VALIDATION_SPLITS):
            matches = ([file for file in files if name in _words(file, self.path)] for name in names)
            found.append(next((match for match in matches if match), []))
            if not found[-1]:
                listed = ", ".join(str(file.relative_to(self.path)) for file in files[:10])
                raise data_error(
                    self.data,
                    f"no file is named {' or '.join(names)}; found: {listed}",
                    "rename them, or give a single file",
                )
        return found[0], found[1]


@dataclass(frozen=True)
class Table:
    """A data set with a text column, streamed: of the hub, or of local files that `datasets` can read."""

    data: str
    path: str
    config: str | None
    column: str
    num_validation_documents: int | None

    def identity(self) -> dict[str, Any]:
        """The files' paths, sizes and times; of a data set of the hub its name alone, so that no network is needed."""
        local = Path(self.path)
        place = _stamps([local, *local.rglob("*")]) if local.exists() else self.path
        return {
            "table": [place, self.config, self.column],
            "held_out": self.num_validation_documents or HELD_OUT_DOCUMENTS,
        }

    def open(self) -> tuple[Documents, Documents]:
        """Training and validation documents; without a validation split the first documents validate."""
        splits, num = self._splits(), self.num_validation_documents
        if "train" not in splits:
            raise data_error(self.data, f"it has no split train, only: {', '.join(sorted(splits))}", "add that split")
        train = self._documents(splits["train"])
        name = next((name for name in VALIDATION_SPLITS if name in splits), None)
        if name is None:
            num = HELD_OUT_DOCUMENTS if num is None else num
            return replace(train, rows=train.rows.skip(num)), replace(train, rows=train.rows.take(num))
        if num is not None:
            raise data_error(
                self.data,
                f"its split {name} validates, and task.options.num_validation_documents is {num}",
                "leave that empty",
            )
        return train, self._documents(splits[name])

    def _splits(self) -> dict[str, datasets.IterableDataset]:
        local = Path(self.path)
        try:
            if local.is_file():
                return dict(datasets.load_dataset(str(local.parent), data_files=local.name, streaming=True))
            return dict(datasets.load_dataset(self.path, self.config, streaming=True))
        except READ_ERRORS as error:
            if local.is_file():
                raise data_error(self.data, f"datasets cannot load it ({error})", "write or copy it anew") from error
            if local.is_dir():
                raise data_error(
                    self.data,
                    f"the folder holds no .txt file, and datasets cannot load it ({error})",
                    "put train.txt and valid.txt there, or Parquet or JSONL files",
                ) from error
            raise data_error(
                self.data,
                f"no such file or folder here, and the hub did not give a data set of that name ({error})",
                "check spelling and network, log in with `hf auth login` if it is gated, or give a local folder",
            ) from error

    def _documents(self, rows: datasets.IterableDataset) -> Documents:
        documents = Documents(self.data, rows, self.column)
        columns = documents.columns()
        if self.column not in columns:
            raise data_error(
                self.data,
                f"it has no column {self.column!r}{closest(self.column, columns)}, only: {', '.join(columns)}",
                "name the one that holds the text with task.options.text_column",
            )
        return documents


def find_source(data: str, text_column: str | None = None, num_validation_documents: int | None = None) -> Source:
    """The text that `data` names: a file, a folder, or owner/name[:configuration] of the hub; nothing is read yet.

    Raises:
        ValueError: no such file, no name of a data set, or options of data sets for plain text files.
    """
    if num_validation_documents is not None and num_validation_documents < 1:
        raise ValueError(
            f"task.options.num_validation_documents is {num_validation_documents}: it must be at least 1; leave it "
            f"empty for {HELD_OUT_DOCUMENTS:,}"
        )
    path = Path(data).expanduser()
    place, config = str(path), None
    if not data or not path.exists():
        named = re.fullmatch(HUB_NAME, data)
        if not named:
            fix = "give one that exists with --task.options.data PATH, or owner/name:configuration of the hub"
            raise data_error(data, "no such file or folder", fix)
        place, config = named["path"], named["config"]
    elif _is_plain(path):
        if text_column is not None or num_validation_documents is not None:
            raise data_error(
                data, "text files have no columns", "remove task.options.text_column and num_validation_documents"
            )
        return TextFiles(data, path)
    return Table(data, place, config, text_column or "text", num_validation_documents)


def _is_plain(path: Path) -> bool:
    """Whether to read text files here; a README.txt beside tables is none."""
    if path.is_file():
        return path.suffix not in TABLE_SUFFIXES
    files = _text_files(path)
    if any("train" in _words(file, path) for file in files):
        return True
    return bool(files) and not any(file.suffix in TABLE_SUFFIXES for file in path.rglob("*"))


def _text_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file())


def _words(file: Path, folder: Path) -> list[str]:
    """The words of a file's path below `folder`."""
    return re.split(r"[^a-z]+", str(file.relative_to(folder)).lower())


def _stamps(files: Iterable[Path]) -> list[list[Any]]:
    """Path, size in bytes and time of change of each file."""
    stats = ((file, file.stat()) for file in sorted(files) if file.is_file())
    return [[str(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in stats]
