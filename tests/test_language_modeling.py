"""Language modelling: vocabularies, contexts, and perplexity per token and per word."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from scale_guide.tasks import language_modeling
from scale_guide.tasks._corpus import Lines
from scale_guide.tasks._tokenizers import WordTokenizer, load_tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data"
TRAIN = " the cat sat\n\n on the mat\nthe end\n"  # 8 words, 4 line ends
build = language_modeling.build


def needs(*names: str) -> Any:
    lacking = [str(SHARED / name) for name in names if not (SHARED / name).exists()]
    return pytest.mark.skipif(bool(lacking), reason=f"not here: {lacking}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.txt").write_text(TRAIN)
    (tmp_path / "valid.txt").write_text("the dog sat\non the mat\n")
    return tmp_path


@needs("wikitext-2")
def test_wikitext_2_has_the_known_numbers_of_words() -> None:
    task = build(data=str(SHARED / "wikitext-2"), context_length=35)
    assert (len(task.train.tokens.ids), len(task.validation.tokens.ids)) == (2_088_628, 217_646)
    assert task.facts == {"vocab_size": 33_278, "max_length": 35}
    tokenizer = WordTokenizer(Lines([SHARED / "wikitext-2" / "train.txt"]), None)
    ids, words = tokenizer.encode(list(Lines([SHARED / "wikitext-2" / "test.txt"])))
    assert len(ids) == words.sum() == 245_569


@needs("wikitext-2", "gpt2-tokenizer")
def test_gpt2_tokens_of_real_text_count_the_same_words() -> None:
    tokenizer = load_tokenizer(str(SHARED / "gpt2-tokenizer"))
    assert tokenizer.vocab_size == 50_257
    ids, words = tokenizer.encode(list(Lines([SHARED / "wikitext-2" / "valid.txt"])))
    assert words.sum() == 217_646
    assert len(ids) == len(words) > 1.1 * 217_646
    text = "".join(map(tokenizer.tokenizer.id_to_token, ids[:40].tolist()))
    assert text.replace("Ġ", " ").replace("Ċ", "\n").startswith(" \n = Homarus gammarus = \n \n Homarus")


def test_word_vocabulary_is_by_frequency_with_line_ends(folder: Path) -> None:
    task = build(data=str(folder), context_length=4)
    words = ["<eos>", "<unk>", "the", "cat", "sat", "on", "mat", "end"]
    assert task.facts == {"vocab_size": len(words), "max_length": 4}
    text = ["the", "cat", "sat", "<eos>", "<eos>", "on", "the", "mat", "<eos>", "the", "end", "<eos>"]
    assert task.train.tokens.ids.tolist() == [words.index(word) for word in text]
    unseen = ["the", "<unk>", "sat", "<eos>", "on", "the", "mat", "<eos>"]
    assert task.validation.tokens.ids.tolist() == [words.index(word) for word in unseen]


def test_word_vocabulary_may_be_cut(folder: Path) -> None:
    task = build(data=str(folder), vocab_size=4, context_length=4)
    assert task.facts["vocab_size"] == 4
    assert task.train.tokens.ids.tolist() == [2, 3, 1, 0, 0, 1, 2, 1, 0, 2, 1, 0]


def test_contexts_predict_each_token_once(folder: Path) -> None:
    task = build(data=str(folder), context_length=4)
    assert len(task.train) == 2  # 12 tokens: 11 targets, of which 8 fill contexts
    samples = [task.train[i] for i in range(2)]
    assert torch.cat([s["input"] for s in samples]).tolist() == task.train.tokens.ids[:8].tolist()
    assert torch.cat([s["target"] for s in samples]).tolist() == task.train.tokens.ids[1:9].tolist()
    assert all(s["input"].dtype == s["target"].dtype == torch.int64 for s in samples)
    assert [int(s["words"]) for s in samples] == [4, 4]
    assert len(list(iter(task.train))) == 2
    assert len(build(data=str(folder), context_length=7).validation) == 1  # exactly one context and its last target
    assert torch.equal(pickle.loads(pickle.dumps(task)).train[1]["input"], samples[1]["input"])


def write_byte_tokenizer(folder: Path) -> Path:
    """vocab.json and merges.txt of a byte-level tokenizer that knows bytes alone, and "Ġthe"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    words = [*alphabet, *("".join(pair) for pair in merges)]
    folder.mkdir()
    Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges)).model.save(str(folder))
    return folder


def test_words_of_subword_tokens_are_counted_by_their_first_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_byte_tokenizer(tmp_path / "bpe")))
    ids, words = tokenizer.encode([" the cat\u00e9", "", "\u65e5\u672c  the"])
    pieces = [tokenizer.tokenizer.id_to_token(i) for i in ids.tolist()]
    line_1 = ["Ġthe", "Ġ", "c", "a", "t", "Ã", "©", "Ċ"]
    line_3 = ["æ", "Ĺ", "¥", "æ", "ľ", "¬", "Ġ", "Ġthe", "Ċ"]  # three bytes a character, all with the same offsets
    assert pieces == [*line_1, "Ċ", *line_3]
    words_1, words_3 = [1, 0, 1, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0, 1, 1]
    assert words.tolist() == [*words_1, 1, *words_3]


def test_word_pieces_count_no_line_ends_and_every_word(tmp_path: Path) -> None:
    vocabulary = ["[UNK]", "the", "cat", "##s", "sat"]
    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.enable_truncation(2)
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(tmp_path / "bert")
    tokenizer = load_tokenizer(str(tmp_path / "bert"))
    ids, words = tokenizer.encode(["The cats dogs sat", "", "sat."])
    assert ids.tolist() == [1, 2, 3, 0, 4, 4, 0]
    assert words.tolist() == [1, 1, 0, 1, 1, 1, 0]


@needs("wikitext-2")
def test_word_pieces_of_real_text_count_its_words(tmp_path: Path) -> None:
    """Word pieces as the paper's (bert-base-cased), learned from the text itself; they have none for a line end."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    lines = list(Lines([SHARED / "wikitext-2" / "valid.txt"]))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=3_000, special_tokens=special, show_progress=False)
    backend.train_from_iterator(lines, trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    ids, words = tokenizer.encode(lines)
    assert tokenizer.vocab_size == 3_000
    assert words.sum() == sum(len(line.split()) for line in lines) == 217_646 - len(lines)
    assert not {2, 3} & set(ids.tolist())  # no [CLS], no [SEP]


def test_scores_per_token_and_per_word(tmp_path: Path, folder: Path) -> None:
    task = build(data=str(folder), tokenizer=str(write_byte_tokenizer(tmp_path / "bpe")), context_length=5)
    batch = task.collate([task.train[i] for i in range(len(task.train))])
    output = torch.randn(*batch["input"].shape, task.facts["vocab_size"])
    nll = output.log_softmax(-1).gather(-1, batch["target"][..., None])[..., 0].neg()
    assert task.count(batch) == nll.numel()
    assert task.loss(output, batch).item() == pytest.approx(nll.sum().item(), rel=1e-5)
    # " the cat sat\n" ..: the first token, of the first word, is never a target; the last ones fill no context.
    words = batch["words"].sum().item()
    text = task.train.tokens.ids[1 : 5 * len(task.train) + 1].tolist()
    tokenizer = load_tokenizer(str(tmp_path / "bpe")).tokenizer
    decoded = "".join(tokenizer.id_to_token(i) for i in text).replace("Ġ", " ").replace("Ċ", " \n ")
    assert words == len(decoded.replace("\n", "<eos>").split())
    result = task.summarize({name: value.item() for name, value in task.scores(output, batch).items()})
    assert result["loss"] == pytest.approx(nll.mean().item(), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nll.mean().item()), rel=1e-5)
    assert result["word_perplexity"] == pytest.approx(math.exp(nll.sum().item() / words), rel=1e-4)
    batch["weight"][0] = 0
    rest = task.scores(output, batch)
    assert rest["tokens"] == nll[1:].numel()
    assert rest["words"] == batch["words"][1:].sum()
    assert rest["loss"].item() == pytest.approx(nll[1:].sum().item(), rel=1e-5)
    assert task.loss(output, batch).item() == pytest.approx(nll[1:].sum().item(), rel=1e-5)


def test_uniform_model_has_the_perplexity_of_its_vocabulary(folder: Path) -> None:
    task = build(data=str(folder), context_length=3)
    batch = task.collate([task.validation[i] for i in range(2)])
    result = task.summarize({k: v.item() for k, v in task.scores(torch.zeros(2, 3, 8), batch).items()})
    assert result["perplexity"] == pytest.approx(8) == result["word_perplexity"]
    assert task.score in result
    assert task.summarize({"loss": 1e6, "tokens": 1.0, "words": 1.0})["perplexity"] == math.inf


@pytest.mark.parametrize(
    "names",
    [("wiki.train.tokens", "wiki.valid.tokens"), ("train/a.txt", "test/a.txt"), ("my-train-1.txt", "my-dev.txt")],
)
def test_files_are_found_by_the_words_of_their_names(tmp_path: Path, names: tuple[str, str]) -> None:
    for name, text in zip(names, (TRAIN, "the mat sat\n"), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "README.txt").write_text("constrained by validity\n")
    task = build(data=str(tmp_path), context_length=3)
    assert (len(task.train.tokens.ids), len(task.validation.tokens.ids)) == (12, 4)


def test_validation_is_preferred_to_test_and_files_of_a_split_are_joined(folder: Path) -> None:
    (folder / "test.txt").write_text("mat\n" * 50)
    (folder / "train.part2.txt").write_text("\ufeffthe cat")  # a byte-order mark, and no line end
    task = build(data=str(folder), context_length=3)
    assert len(task.validation.tokens.ids) == 8
    assert task.train.tokens.ids.tolist()[:3] == [2, 3, 0]
    assert len(task.train.tokens.ids) == 15


def test_last_tenth_of_a_single_file_is_held_out(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("".join(f"w{i} x y z\n" for i in range(20)))
    task = build(data=str(file), context_length=4)
    assert (len(task.train.tokens.ids), len(task.validation.tokens.ids)) == (18 * 5, 2 * 5)
    assert task.validation.tokens.ids.tolist()[0] == 1  # w18 was never read in training


def test_text_that_cannot_be_used(tmp_path: Path, folder: Path) -> None:
    def error(data: Path | str, **options: Any) -> str:
        with pytest.raises(ValueError, match=r"task.options") as caught:
            build(data=str(data), **options)
        return str(caught.value)

    assert "task.options.data is '': no such file or folder" in error("")
    assert "no such file or folder" in error(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "holds no .txt file" in error(tmp_path / "empty")
    assert "its training text has 12 tokens, and one context needs 13" in error(folder, context_length=12)
    assert "its validation text has 8 tokens" in error(folder, context_length=8)
    assert "context_length is 0" in error(folder, context_length=0)
    assert "vocab_size is 2 with" in error(folder, vocab_size=2)
    assert "vocab_size is 9 with task.options.tokenizer 'gpt2'" in error(folder, vocab_size=9, tokenizer="gpt2")
    (folder / "valid.txt").rename(folder / "notes.txt")
    assert "no file is named validation or valid or val or dev or test; found: notes.txt, train.txt" in error(folder)
    (folder / "valid.txt").write_bytes(b"caf\xe9\n")
    assert "valid.txt': it is not UTF-8 text" in error(folder, context_length=4)
    (folder / "valid.txt").write_text("")
    assert "its validation text has 0 tokens" in error(folder, context_length=4)
    assert "its training text has 0 tokens" in error(folder / "valid.txt")


def test_tokenizers_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"task.options.tokenizer is '/nowhere/x': no such folder; give word"):
        load_tokenizer("/nowhere/x")
    with pytest.raises(ValueError, match="transformers cannot load it"):
        load_tokenizer(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"tokenizer is 'no-such-tokenizer': transformers cannot load it"):
        load_tokenizer("no-such-tokenizer")
