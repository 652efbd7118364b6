"""Text files as streams of tokens: a word-level vocabulary of one's own, or a tokenizer of `transformers`."""

from __future__ import annotations

import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer

EOS, UNKNOWN = "<eos>", "<unk>"
SUFFIXES = (".txt", ".tokens")
VALIDATION_SPLITS = ("validation", "valid", "val", "dev", "test")
HELD_OUT = 0.1  # of the lines of a single file
LINES_AT_ONCE = 10_000


class Tokens:
    """A stream of tokens, ids int32 [n], and how many words begin in the first i of them, int64 [n + 1]."""

    def __init__(self, ids: Tensor, words_before: Tensor) -> None:
        self.ids = ids
        self.words_before = words_before


class TextTokenizer(Protocol):
    """Encodes lines of text."""

    vocab_size: int

    def encode(self, lines: Iterable[str]) -> Tokens:
        """The lines' tokens, one stream."""
        ...


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


def data_error(data: str, rule: str, fix: str) -> ValueError:
    """The error for text that cannot be used."""
    return ValueError(f"task.options.data is {data!r}: {rule}; {fix}")


def find_text(data: str) -> tuple[Lines, Lines]:
    """Training and validation lines of a folder of text files, or of one file whose last tenth is held out.

    In a folder, files belong to a split by a word of their path: train.txt, wiki.valid.tokens, test/part-1.txt.

    Raises:
        ValueError: nothing there, no text, or a split missing.
    """
    path = Path(data).expanduser()
    if not data or not path.exists():
        raise data_error(data, "no such file or folder", "give one that exists with --task.options.data PATH")
    if path.is_file():
        num_lines = sum(1 for _ in Lines([path]))
        stop = max(0, num_lines - max(1, round(num_lines * HELD_OUT)))
        return Lines([path], 0, stop), Lines([path], stop)
    files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    if not files:
        raise data_error(data, "the folder holds no .txt file", "put train.txt and valid.txt there")
    words = {file: re.split(r"[^a-z]+", str(file.relative_to(path)).lower()) for file in files}
    found: list[list[Path]] = []
    for names in (("train",), VALIDATION_SPLITS):
        matches = ([file for file in files if name in words[file]] for name in names)
        found.append(next((match for match in matches if match), []))
        if not found[-1]:
            listed = ", ".join(str(file.relative_to(path)) for file in files[:10])
            raise data_error(
                data, f"no file is named {' or '.join(names)}; found: {listed}", "rename them, or give a single file"
            )
    return Lines(found[0]), Lines(found[1])


class WordTokenizer:
    """Words split at spaces, the most frequent first; each line ends with <eos>, rare words are <unk>."""

    def __init__(self, lines: Iterable[str], vocab_size: int | None) -> None:
        counts: Counter[str] = Counter()
        for line in lines:
            counts.update(line.split())
        for special in (EOS, UNKNOWN):
            counts.pop(special, None)
        limit = None if vocab_size is None else max(vocab_size - 2, 0)
        words = [EOS, UNKNOWN, *(word for word, _ in counts.most_common(limit))]
        self.ids = {word: number for number, word in enumerate(words)}
        self.vocab_size = len(words)

    def encode(self, lines: Iterable[str]) -> Tokens:
        """The lines' words, and <eos> after each line; every token is a word."""
        ids, unknown, eos = array("i"), self.ids[UNKNOWN], self.ids[EOS]
        for line in lines:
            ids.extend(self.ids.get(word, unknown) for word in line.split())
            ids.append(eos)
        return Tokens(_tensor(ids), torch.arange(len(ids) + 1))


class SubwordTokenizer:
    """A tokenizer of the `tokenizers` library, without special tokens; lines keep their line ends."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, lines: Iterable[str]) -> Tokens:
        """The lines' tokens. A word, or a line end, begins in the first token that reaches past its first character.

        So each word counts once, however many tokens it has and whatever bytes of a character they share; a line end
        counts as a word if there is a token for it, as in word-level text.
        """
        ids, words, numbered = array("i"), array("i"), iter(lines)
        with _one_thread():
            while block := [line + "\n" for line in islice(numbered, LINES_AT_ONCE)]:
                for line, encoding in zip(
                    block, self.tokenizer.encode_batch(block, add_special_tokens=False), strict=True
                ):
                    ids.extend(encoding.ids)
                    words.extend(_count_words(line, encoding))
        before = torch.zeros(len(words) + 1, dtype=torch.int64)
        torch.cumsum(_tensor(words), 0, out=before[1:])
        return Tokens(_tensor(ids), before)


def load_tokenizer(name: str) -> SubwordTokenizer:
    """Sub-word tokenizer from a folder, or by its name on the hub.

    Raises:
        ValueError: none there, or one that is slow or empty.
    """
    folder = Path(name).expanduser()
    pair = folder / "vocab.json", folder / "merges.txt"
    if pair[0].exists() and pair[1].exists() and not (folder / "tokenizer.json").exists():
        # Byte-level BPE as GPT-2's files come. AutoTokenizer refuses such a folder, and GPT2TokenizerFast of
        # transformers 5 takes vocab_file and merges_file but ignores them: a tokenizer without tokens.
        tokenizer = Tokenizer(models.BPE.from_file(*map(str, pair)))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return SubwordTokenizer(tokenizer)
    if not folder.exists() and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise _tokenizer_error(name, "no such folder")
    try:
        loaded = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _tokenizer_error(name, f"transformers cannot load it ({error})") from error
    if not loaded.is_fast or len(loaded) < 2:
        raise _tokenizer_error(name, "it is not a fast tokenizer with tokens")
    return SubwordTokenizer(loaded.backend_tokenizer)


def _tokenizer_error(name: str, rule: str) -> ValueError:
    return ValueError(
        f"task.options.tokenizer is {name!r}: {rule}; give word, a folder with tokenizer.json or with vocab.json and "
        "merges.txt, or a name on the hub such as bert-base-cased"
    )


def _count_words(line: str, encoding: Encoding) -> list[int]:
    """How many words, or line ends, begin in each token of a line."""
    if not encoding.ids:
        return []
    spaces = np.array([True, *map(str.isspace, line)])
    begins = (spaces[:-1] & ~spaces[1:]) | (np.arange(len(line)) == len(line) - 1)
    before = np.concatenate([[0], np.cumsum(begins)])
    ends = np.array([end for _, end in encoding.offsets])
    return np.diff(before[ends], prepend=0).tolist()  # type: ignore[no-any-return]


def _tensor(numbers: array[int]) -> Tensor:
    return torch.from_numpy(np.frombuffer(numbers, dtype=np.int32).copy())


@contextmanager
def _one_thread() -> Iterator[None]:
    """No threads in the tokenizer, unless the user says so.

    They are no faster on lines, and forking a loader's workers after them prints a warning in every worker.
    """
    given = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        yield
    finally:
        if given is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
