"""Text is tokenised once: cached by what it is, written whole, by one process, in memory that does not grow."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from scale_guide.data_order import TrainOrder
from scale_guide.tasks import language_modeling
from scale_guide.tasks._token_files import Tokens, cache_folder, write_tokens, written_once
from scale_guide.tasks._tokenizers import WordTokenizer, load_tokenizer

build = language_modeling.build


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return cache_folder()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.txt").write_text("".join(f"a b{i % 7} c d\n" for i in range(40)))
    (data / "valid.txt").write_text("a b1 x d\n" * 9)
    return data


def entries(cache: Path) -> set[Path]:
    return {path for path in cache.iterdir() if path.suffix != ".lock"}


def word_level(vocabulary: dict[str, int], unknown: str | None = "[UNK]") -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown or "lacking"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_text_is_tokenised_once(cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(data=str(folder), context_length=4)
    (made,) = entries(cache)
    with monkeypatch.context() as patch:
        patch.setattr(language_modeling, "write_tokens", None)  # would raise
        again = build(data=str(folder), context_length=9)
    assert again.train.tokens.folder == made
    assert again.train.tokens.ids.tolist() == first.train.tokens.ids.tolist()
    assert again.facts == {"vocab_size": first.facts["vocab_size"], "max_length": 9}
    (folder / "notes.md").write_text("no part of the text")
    build(data=str(folder), context_length=4)
    assert entries(cache) == {made}


def test_another_text_or_tokenizer_is_tokenised_anew(cache: Path, folder: Path, tmp_path: Path) -> None:
    for name, words in (("one", ["[UNK]", "a"]), ("two", ["[UNK]", "b1"])):
        word_level({word: i for i, word in enumerate(words)}).save_pretrained(tmp_path / name)
    kinds: list[dict[str, Any]] = [{}, {"vocab_size": 5}, {"max_tokens": 50}]
    kinds += [{"tokenizer": str(tmp_path / name)} for name in ("one", "two")]
    for num, options in enumerate(kinds, 1):
        build(data=str(folder), context_length=4, **options)
        assert len(entries(cache)) == num
    old = (folder / "valid.txt").stat()
    (folder / "valid.txt").write_text("a b2 x d\n" * 9)  # as long as before
    os.utime(folder / "valid.txt", ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    task = build(data=str(folder), context_length=4)
    assert len(entries(cache)) == 1 + len(kinds)
    assert (
        task.validation.tokens.ids.tolist() == build(data=str(folder), context_length=5).validation.tokens.ids.tolist()
    )


@pytest.mark.parametrize(("largest", "dtype"), [(65_535, np.uint16), (65_536, np.int32)])
def test_ids_take_two_bytes_where_they_fit(
    cache: Path, folder: Path, tmp_path: Path, largest: int, dtype: type[np.generic]
) -> None:
    """And a vocabulary with gaps is as large as its largest id says."""
    word_level({"[UNK]": 0, "a": 1, "d": largest}).save_pretrained(tmp_path / "gaps")
    task = build(data=str(folder), tokenizer=str(tmp_path / "gaps"), context_length=4)
    assert task.facts["vocab_size"] == largest + 1
    assert task.train.tokens.ids.dtype == dtype
    assert task.train.tokens.ids[:5].tolist() == [1, 0, 0, largest, 1]
    assert task.train[0]["target"].tolist() == [0, 0, largest, 1]


def test_words_fit_a_byte_whatever_a_tokenizer_drops(tmp_path: Path) -> None:
    backend = word_level({"[UNK]": 0, "a": 1})
    backend.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("-", "removed")
    backend.save_pretrained(tmp_path / "drops")
    _, words = load_tokenizer(str(tmp_path / "drops")).encode(["- " * 300 + "a"])
    assert words.dtype == np.uint8
    assert int(words.sum()) in range(255, 303)


def test_what_fails_leaves_nothing_and_what_was_cut_off_is_cleared(cache: Path, folder: Path) -> None:
    good = (folder / "valid.txt").read_text()
    (folder / "valid.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        build(data=str(folder), context_length=4)
    assert entries(cache) == set()
    (lock,) = cache.iterdir()
    (folder / "valid.txt").write_text(good)
    build(data=str(folder), context_length=4)
    (made,) = entries(cache)

    def write(draft: Path) -> None:
        assert not list(draft.iterdir())
        (draft / "whole").write_text("1")

    identity = {"some": "text"}
    done = written_once(identity, write)
    (done / "whole").unlink()
    done.rename(done.with_suffix(".partial"))  # as a killed process leaves it
    (done.with_suffix(".partial") / "half").write_text("")
    assert written_once(identity, write) == done
    assert entries(cache) == {made, done}
    assert lock.exists()


def test_a_cache_that_cannot_be_written(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "below")
    with pytest.raises(ValueError, match=r"task.options.data cannot be tokenised into .*HF_DATASETS_CACHE"):
        build(data=str(folder), context_length=4)


def build_and_log(group: Any, data: str, log: str, cache: str) -> tuple[str, int]:
    """Hash of the tokens, and vocab_size, of a task; a line is added to `log` if this process wrote the tokens."""

    def logged(*args: Any) -> None:
        with open(log, "a") as file:
            file.write("written\n")
        write_tokens(*args)

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    language_modeling.write_tokens = logged  # type: ignore[attr-defined]
    try:
        torch.distributed.barrier(group)
        task = build(data=data, context_length=5)
    finally:
        datasets.config.HF_DATASETS_CACHE = before
        language_modeling.write_tokens = write_tokens  # type: ignore[attr-defined]
    return hashlib.sha256(task.train.tokens.ids.tobytes()).hexdigest(), task.facts["vocab_size"]


def test_of_several_processes_one_writes(pool: Any, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train.txt", "valid.txt"):
        (data / name).write_text("".join(f"w{i % 5_000} x y\n" for i in range(50_000)))
    log = tmp_path / "log"
    results = pool.run(build_and_log, 2, data=str(data), log=str(log), cache=str(tmp_path / "cache"))
    assert len(set(results)) == 1
    assert log.read_text() == "written\n"


def test_copies_in_other_processes_map_the_same_file(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("a b c\n" * 50_000)
    task = build(data=str(tmp_path / "book.txt"), context_length=4)
    pickled = pickle.dumps(task)
    assert len(pickled) < 2_000
    copy = pickle.loads(pickled)
    assert all(torch.equal(copy.train[9][key], value) for key, value in task.train[9].items())
    with pytest.raises(ValueError, match="read-only"):
        copy.train.tokens.ids[0] = 1


def peak_memory(folder: Path, num_lines: int, tokenizer: Any) -> int:
    """Peak bytes while a text of so many lines is tokenised, and a context of it read."""
    lines = (
        f"the {i % 100} cat sat on the mat, and then it sat on the other mat for a while" for i in range(num_lines)
    )
    folder.mkdir()
    tracemalloc.start()
    write_tokens(folder, tokenizer, lines, iter(["the end"]), None)
    data = language_modeling.TextData(Tokens(folder, "train"), 75)
    assert int(data[len(data) - 1]["words"]) > 10
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("kind", ["word", "sub-words"])
def test_memory_does_not_grow_with_the_text(tmp_path: Path, kind: str) -> None:
    word_level({"[UNK]": 0, "the": 1}).save_pretrained(tmp_path / "words")
    subwords = load_tokenizer(str(tmp_path / "words"))
    tokenizer = WordTokenizer(["the cat sat on"], None) if kind == "word" else subwords
    small, large = (peak_memory(tmp_path / str(num), num, tokenizer) for num in (2_000, 15_000))
    assert (tmp_path / "15000" / "train.ids").stat().st_size > 500_000
    assert large < 1.2 * small
    assert large < 2_000_000


def test_counting_a_vocabulary_holds_distinct_words_alone() -> None:
    lines = (f"w{i % 100} x y z and so on" for i in range(100_000))  # 2 MB
    tracemalloc.start()
    WordTokenizer(lines, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300_000


def test_contexts_are_the_same_for_every_number_of_processes_and_after_a_resume(cache: Path, folder: Path) -> None:
    def steps(world_size: int, first_step: int) -> list[torch.Tensor]:
        """Tokens [B, T] of each step's global batch, of a task built anew."""
        task = build(data=str(folder), context_length=3)
        sizes = {"micro_batch_size": 8 // world_size, "world_size": world_size}
        orders = [
            TrainOrder(len(task.train), 8, rank=r, seed=0, first_step=first_step, last_step=12, **sizes)
            for r in range(world_size)
        ]
        batches = [[task.collate([task.train[i] for _, i in keys])["input"] for keys in order] for order in orders]
        return [torch.cat(parts) for parts in zip(*batches, strict=True)]

    alone = steps(1, 0)
    assert len(alone) == 12
    for world_size, first_step in ((2, 0), (4, 0), (2, 7)):
        for left, right in zip(steps(world_size, first_step), alone[first_step:], strict=True):
            assert torch.equal(left, right)


# --- tokenizers that cannot serve


def tokenizer_error(name: Path) -> str:
    with pytest.raises(ValueError, match=r"task.options.tokenizer is .*; give word, a folder") as caught:
        load_tokenizer(str(name))
    return str(caught.value)


def test_byte_level_files_that_lack_ids(tmp_path: Path) -> None:
    alphabet = {word: i for i, word in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    for text, lines, message in (
        (json.dumps(alphabet), "t h\n", "vocab.json has no ids for the line 't h' of merges.txt"),
        (json.dumps(alphabet), "#version: 0.2\nt h e\n", "vocab.json has no ids for the line 't h e'"),
        (json.dumps({"a": 0, "b": 1}), "", "it cannot encode every text (it has no unknown token, nor all bytes)"),
        (json.dumps(alphabet)[:500], "", "its files cannot be read"),
        ("{}", "", "it cannot encode every text"),
        ("[1]", "", "vocab.json does not give an id for each token"),
        (json.dumps({"a": "0"}), "", "vocab.json does not give an id for each token"),
    ):
        vocabulary.write_text(text)
        merges.write_text(lines)
        assert message in tokenizer_error(tmp_path)
    vocabulary.write_text(json.dumps(alphabet))
    assert load_tokenizer(str(tmp_path)).vocab_size == 256


def test_tokenizers_without_the_ids_needed(tmp_path: Path) -> None:
    backends = {
        "word level": models.WordLevel({"a": 0, "b": 1}, unk_token="[UNK]"),
        "word pieces": models.WordPiece({"a": 0, "b": 1}, unk_token="[UNK]"),
        "unigram": models.Unigram([("a", -1.0), ("b", -1.0)]),
        "bpe": models.BPE({"a": 0, "b": 1}, []),
    }
    for name, model in backends.items():
        Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        assert "it cannot encode every text" in tokenizer_error(tmp_path), name
    (tmp_path / "tokenizer.json").write_text((tmp_path / "tokenizer.json").read_text()[:80])
    assert "transformers cannot load it" in tokenizer_error(tmp_path)
