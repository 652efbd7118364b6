"""Text tokenised once, on disk: written whole or not at all by one process of a machine, and mapped by all of them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from scale_guide.tasks._tokenizers import TextTokenizer, progress

FORMAT = 1  # raise it when the files, or what any tokenizer of this package gives, change
LINES_AT_ONCE = 1_000
FACTS = "facts.json"


class Tokens:
    """One stream of tokens, mapped from disk: `ids` uint16 or int32 [n], and `words` uint8 [n] that begin in each.

    Its copies in other processes map the same files: a pickle holds their names alone.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder = folder
        self.split = split
        facts = json.loads((folder / FACTS).read_text())
        num_tokens = facts[split]
        self.ids = _map(folder / f"{split}.ids", np.dtype(facts["dtype"]), num_tokens)
        self.words: NDArray[np.uint8] = _map(folder / f"{split}.words", np.dtype(np.uint8), num_tokens)

    def __reduce__(self) -> tuple[type[Tokens], tuple[Path, str]]:
        return Tokens, (self.folder, self.split)


def cache_folder() -> Path:
    """Folder of all tokenised text: scale_guide in the cache of `datasets` (HF_DATASETS_CACHE, HF_HOME)."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "scale_guide"


def written_once(identity: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
    """Folder of what `write` writes for text and tokenizer of this identity; if it is not there yet, it is written.

    Of several processes one writes and the others wait. What a killed process left half-written is cleared away.

    Raises:
        ValueError: whatever is wrong with the text, or a folder that cannot be written.
    """
    text = json.dumps({"format": FORMAT, **identity}, sort_keys=True)
    folder = cache_folder() / hashlib.sha256(text.encode()).hexdigest()[:32]
    if folder.exists():
        return folder
    draft = folder.with_suffix(".partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                _write_whole(draft, folder, write)
    except OSError as error:
        raise ValueError(
            f"task.options.data cannot be tokenised into {folder.parent} ({error}): make room there, or set the "
            "environment variable HF_DATASETS_CACHE to a folder that can be written"
        ) from error
    return folder


def _write_whole(draft: Path, folder: Path, write: Callable[[Path], None]) -> None:
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        write(draft)
        draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_tokens(
    folder: Path, tokenizer: TextTokenizer, train: Iterable[str], validation: Iterable[str], max_tokens: int | None
) -> None:
    """Writes the tokens of both splits, block by block: memory does not grow with the text.

    At most the first `max_tokens` tokens of `train` are read and written.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32)
    facts: dict[str, Any] = {"dtype": dtype.name, "vocab_size": tokenizer.vocab_size}
    for split, lines, limit in (("train", train, max_tokens), ("validation", validation, None)):
        facts[split] = _write_split(folder, split, tokenizer, lines, dtype, limit)
    (folder / FACTS).write_text(json.dumps(facts))


def vocab_size_of(folder: Path) -> int:
    """Size of the vocabulary that the ids of a folder belong to."""
    size: int = json.loads((folder / FACTS).read_text())["vocab_size"]
    return size


def _write_split(
    folder: Path, split: str, tokenizer: TextTokenizer, lines: Iterable[str], dtype: np.dtype[Any], limit: int | None
) -> int:
    """Number of tokens written."""
    numbered, num_tokens = iter(lines), 0
    with (
        (folder / f"{split}.ids").open("wb") as id_file,
        (folder / f"{split}.words").open("wb") as word_file,
        progress(f"tokenising {split}", limit) as bar,
    ):
        while (limit is None or num_tokens < limit) and (block := list(islice(numbered, LINES_AT_ONCE))):
            ids, words = tokenizer.encode(block)
            left = len(ids) if limit is None else limit - num_tokens
            id_file.write(ids[:left].astype(dtype).tobytes())
            word_file.write(words[:left].tobytes())
            num_tokens += len(ids[:left])
            bar.update(len(ids[:left]))
    return num_tokens


def _map(file: Path, dtype: np.dtype[Any], num_tokens: int) -> NDArray[Any]:
    if not num_tokens:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(file, dtype, "r", shape=(num_tokens,)).view(np.ndarray)
