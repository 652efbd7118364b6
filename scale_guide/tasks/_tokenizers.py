"""Lines of text as tokens: a word-level vocabulary of one's own, or a tokenizer of `transformers`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import AutoTokenizer

EOS, UNKNOWN = "<eos>", "<unk>"
MAX_WORDS = 255  # that begin in one token: what a byte holds


class TextTokenizer(Protocol):
    """Encodes lines of text."""

    vocab_size: int

    def encode(self, lines: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Ids of the lines' tokens, one stream [n], and how many words begin in each of them [n]."""
        ...


class WordTokenizer:
    """Words split at spaces, the most frequent first; each line ends with <eos>, rare words are <unk>.

    Args:
        lines: The training text, read once; its distinct words are held in memory, whatever `vocab_size`.
        vocab_size: Words kept, <eos> and <unk> included; None: all.
        max_tokens: Words and line ends that are counted; None: all.
    """

    def __init__(self, lines: Iterable[str], vocab_size: int | None, max_tokens: int | None = None) -> None:
        counts: Counter[str] = Counter()
        num_tokens = 0
        with progress("counting words") as bar:
            for line in lines:
                words = line.split()
                counts.update(words)
                num_tokens += len(words) + 1
                bar.update(len(words) + 1)
                if max_tokens is not None and num_tokens >= max_tokens:
                    break
        for special in (EOS, UNKNOWN):
            counts.pop(special, None)
        limit = None if vocab_size is None else max(vocab_size - 2, 0)
        words = [EOS, UNKNOWN, *(word for word, _ in counts.most_common(limit))]
        self.ids = {word: number for number, word in enumerate(words)}
        self.vocab_size = len(words)

    def encode(self, lines: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Ids of the lines' words, and of <eos> after each line; every token is a word."""
        ids: list[int] = []
        unknown, eos = self.ids[UNKNOWN], self.ids[EOS]
        for line in lines:
            ids.extend(self.ids.get(word, unknown) for word in line.split())
            ids.append(eos)
        return np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=np.uint8)


class SubwordTokenizer:
    """A tokenizer of the `tokenizers` library, without special tokens; lines keep their line ends.

    `vocab_size` is the largest id plus one: some vocabularies have gaps.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.vocab_size: int = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def identity(self) -> str:
        """What tells this tokenizer from any other: a hash of all its settings."""
        return hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()

    def encode(self, lines: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Ids of the lines' tokens. A word, or a line end, begins in the first token past its first character.

        So each word counts once, however many tokens it has and whatever bytes of a character they share; a line end
        counts as a word if there is a token for it, as in word-level text.
        """
        block = [line + "\n" for line in lines]
        with _one_thread():
            encodings = self.tokenizer.encode_batch(block, add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        words = [_count_words(line, encoding) for line, encoding in zip(block, encodings, strict=True)]
        return np.concatenate(ids), np.concatenate(words)


def load_tokenizer(name: str) -> SubwordTokenizer:
    """Sub-word tokenizer from a folder, or by its name on the hub.

    Raises:
        ValueError: none there, or one that is slow, empty, broken, or cannot encode every text.
    """
    folder = Path(name).expanduser()
    pair = folder / "vocab.json", folder / "merges.txt"
    if pair[0].exists() and pair[1].exists() and not (folder / "tokenizer.json").exists():
        return _checked(name, _byte_level(name, *pair))
    if not folder.exists() and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise _tokenizer_error(name, "no such folder")
    try:
        loaded = AutoTokenizer.from_pretrained(str(folder) if folder.exists() else name)
    except (OSError, ValueError, KeyError) as error:  # KeyError: a tokenizer.json that lacks its parts
        raise _tokenizer_error(name, f"transformers cannot load it ({error})") from error
    if not loaded.is_fast or len(loaded) < 2:
        raise _tokenizer_error(name, "it is not a fast tokenizer with tokens")
    return _checked(name, loaded.backend_tokenizer)


def progress(what: str, num_tokens: int | None = None) -> tqdm[NoReturn]:
    """A bar for work of more than two seconds; drawn once a minute where nobody watches, as in a job's log."""
    seconds = 0.1 if sys.stderr.isatty() else 60
    return tqdm(
        desc=what, total=num_tokens, unit=" tokens", unit_scale=True, leave=False, delay=2, mininterval=seconds
    )


def _byte_level(name: str, vocabulary: Path, merges: Path) -> Tokenizer:
    """Byte-level BPE as GPT-2's files come.

    AutoTokenizer refuses such a folder, and GPT2TokenizerFast of transformers 5 takes vocab_file and merges_file but
    ignores them: a tokenizer without tokens.
    """
    try:
        ids = json.loads(vocabulary.read_text(encoding="utf-8"))
        lines = merges.read_text(encoding="utf-8").split("\n")
        pairs = [line.partition(" ")[::2] for line in lines if line and not line.startswith("#version")]
    except ValueError as error:
        raise _tokenizer_error(name, f"its files cannot be read ({error})") from error
    # `tokenizers` raises a bare Exception for these.
    if not isinstance(ids, dict) or not all(isinstance(number, int) for number in ids.values()):
        raise _tokenizer_error(name, "vocab.json does not give an id for each token")
    for merge in pairs:
        if not {*merge, "".join(merge)} <= ids.keys():
            raise _tokenizer_error(name, f"vocab.json has no ids for the line {' '.join(merge)!r} of merges.txt")
    tokenizer = Tokenizer(models.BPE(ids, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def _checked(name: str, tokenizer: Tokenizer) -> SubwordTokenizer:
    """The tokenizer, once it is known to have a token for any text: else text is dropped, or encoding stops midway."""
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    unknown, vocabulary = model.get("unk_token"), model["vocab"]
    if model["type"] == "Unigram":
        whole = model["unk_id"] is not None or model["byte_fallback"]
    elif model["type"] == "BPE":
        whole = model["byte_fallback"] or set(pre_tokenizers.ByteLevel.alphabet()) <= vocabulary.keys()
        whole = whole or unknown in vocabulary
    else:
        whole = unknown in vocabulary
    if not whole:
        lacks = f"its unknown token {unknown!r} has no id" if unknown else "it has no unknown token, nor all bytes"
        raise _tokenizer_error(name, f"it cannot encode every text ({lacks})")
    return SubwordTokenizer(tokenizer)


def _tokenizer_error(name: str, rule: str) -> ValueError:
    return ValueError(
        f"task.options.tokenizer is {name!r}: {rule}; give word, a folder with tokenizer.json or with vocab.json and "
        "merges.txt, or a name on the hub such as bert-base-cased"
    )


def _count_words(line: str, encoding: Encoding) -> NDArray[np.uint8]:
    """How many words, or line ends, begin in each token of a line; 255 where a tokenizer drops more than that."""
    if not encoding.ids:
        return np.empty(0, dtype=np.uint8)
    spaces = np.array([True, *map(str.isspace, line)])
    begins = (spaces[:-1] & ~spaces[1:]) | (np.arange(len(line)) == len(line) - 1)
    before = np.concatenate([[0], np.cumsum(begins)])
    ends = np.array([end for _, end in encoding.offsets])
    words: NDArray[np.uint8] = np.diff(before[ends], prepend=0).clip(0, MAX_WORDS).astype(np.uint8)
    return words


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
