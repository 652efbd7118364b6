"""Language modelling: predict the next token of a text cut into contexts (PAPER.md sections 1 and 2).

The tokens of a split are one stream. Context number c reads tokens cT .. cT + T - 1 and predicts tokens
cT + 1 .. cT + T, so every token but the first is predicted once, up to the last whole context. No state is carried
from one context to the next.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scale_guide.tasks import Batch, logits, ratio, stack, token_losses
from scale_guide.tasks._corpus import data_error, find_source
from scale_guide.tasks._token_files import Tokens, vocab_size_of, write_tokens, written_once
from scale_guide.tasks._tokenizers import TextTokenizer, WordTokenizer, load_tokenizer


class TextData:
    """Contexts of `context_length` tokens: samples of `input` and `target` [T], `words` and `weight`."""

    def __init__(self, tokens: Tokens, context_length: int) -> None:
        self.tokens = tokens
        self.context_length = context_length

    def __len__(self) -> int:
        return (len(self.tokens.ids) - 1) // self.context_length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Context number `index`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.context_length
        stop = start + self.context_length + 1
        ids = torch.from_numpy(self.tokens.ids[start:stop].astype(np.int64))
        words = torch.tensor(int(self.tokens.words[start + 1 : stop].sum()))  # that begin among the targets
        return {"input": ids[:-1], "target": ids[1:], "words": words, "weight": torch.ones(())}


class LanguageModeling:
    """The task: cross-entropy per token; perplexity per token and per word.

    Perplexity per word is exp(total nll / number of words split at spaces), whatever the tokens are. A line end is a
    word where the tokens have one for it. Words are counted from the text, where their first token is a target.
    """

    score = "word_perplexity"

    def __init__(self, train: TextData, validation: TextData, vocab_size: int) -> None:
        self.train = train
        self.validation = validation
        self.facts: dict[str, Any] = {"vocab_size": vocab_size, "max_length": train.context_length}

    def collate(self, samples: list[dict[str, Tensor]]) -> Batch:
        """Batch of `input` and `target` [B, T], `words` and `weight` [B]."""
        return stack(samples)

    def scored(self, batch: Batch) -> Tensor:
        """Weight of each predicted token, fp32 [B, T]."""
        return batch["weight"][:, None].expand_as(batch["target"])

    def count(self, batch: Batch) -> Tensor:
        """Number of predicted tokens, float64 scalar."""
        return self.scored(batch).sum(dtype=torch.float64)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Sum of the cross-entropy over predicted tokens, in nats."""
        return (token_losses(logits(output), batch["target"]) * self.scored(batch)).sum()

    @torch.no_grad()
    def scores(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """Sums: loss in nats, tokens, words."""
        losses = token_losses(logits(output), batch["target"]) * self.scored(batch)
        words = (batch["words"] * batch["weight"]).sum(dtype=torch.float64)
        return {"loss": losses.sum(dtype=torch.float64), "tokens": self.count(batch), "words": words}

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        """Loss (nats per token), perplexity (per token), word_perplexity."""
        per_token, per_word = ratio(sums["loss"], sums["tokens"]), ratio(sums["loss"], sums["words"])
        return {"loss": per_token, "perplexity": _exp(per_token), "word_perplexity": _exp(per_word)}


def _exp(x: float) -> float:
    """exp(x), infinite where a float cannot hold it."""
    return math.exp(x) if not x > 700 else math.inf


def build(
    *,
    data: str,
    tokenizer: str = "word",
    vocab_size: int | None = None,
    context_length: int = 75,
    text_column: str | None = None,
    max_tokens: int | None = None,
    num_validation_documents: int | None = None,
) -> LanguageModeling:
    """Language modelling on text files, tables of documents, or a data set of the Hugging Face hub.

    The text is tokenised once, into `scale_guide` in the cache of `datasets` (HF_DATASETS_CACHE, or datasets/ in
    HF_HOME), 3 or 5 bytes a token, and mapped from there by every process and later run. It is tokenised anew when a
    file or the tokenizer changes; a data set of the hub is taken to stay what it was. `scale-guide layers` does it
    before a launch, as for machines without a network. Documents follow one another, parted by a line end.

    Args:
        data: A folder with train.txt and valid.txt (or validation, val, dev, test; several files a split are joined);
            one text file, whose last tenth of lines validates; a folder or file that `datasets` can load, such as
            Parquet or JSONL; or a data set of the hub as owner/name or owner/name:configuration, streamed:
            Salesforce/wikitext:wikitext-103-raw-v1, Skylion007/openwebtext.
        tokenizer: word (the training text's words split at spaces, <eos> at each line's end), a folder with a
            tokenizer, or the name of one on the hub (fast ones alone).
        vocab_size: Words kept at word level, <eos> and <unk> included; empty: all. Scores of different sizes do not
            compare: each <unk> counts as a word, and is easy.
        context_length: Tokens that one sample reads; the paper takes 75.
        text_column: Column of a data set that holds the text; empty: text.
        max_tokens: Training tokens used, the first ones; no more of the data set is read. Empty: all.
        num_validation_documents: Documents, the first ones, that validate where a data set has no validation split;
            empty: 1,000.

    Raises:
        ValueError: no text, too little of it, or no tokenizer.
    """
    _check_options(tokenizer, vocab_size, context_length, max_tokens)
    source = find_source(data, text_column, num_validation_documents)
    encoder = None if tokenizer == "word" else load_tokenizer(tokenizer)

    def write(folder: Path) -> None:
        train, validation = source.open()
        words: TextTokenizer = encoder or WordTokenizer(train, vocab_size, max_tokens)
        write_tokens(folder, words, train, validation, max_tokens)

    kind = encoder.identity() if encoder else ["word", vocab_size]
    folder = written_once({"source": source.identity(), "tokenizer": kind, "max_tokens": max_tokens}, write)
    parts = []
    for split, name in (("train", "training"), ("validation", "validation")):
        tokens = Tokens(folder, split)
        if len(tokens.ids) <= context_length:
            raise data_error(
                data,
                f"its {name} text has {len(tokens.ids)} tokens, and one context needs {context_length + 1}",
                "give more text, or set task.options.context_length lower",
            )
        parts.append(TextData(tokens, context_length))
    return LanguageModeling(parts[0], parts[1], vocab_size_of(folder))


def _check_options(tokenizer: str, vocab_size: int | None, context_length: int, max_tokens: int | None) -> None:
    if context_length < 1:
        raise ValueError(f"task.options.context_length is {context_length}: it must be at least 1; the paper takes 75")
    if max_tokens is not None and max_tokens <= context_length:
        raise ValueError(
            f"task.options.max_tokens is {max_tokens}: one context needs {context_length + 1}; set it higher, or "
            "leave it empty for all of the text"
        )
    if vocab_size is not None and (tokenizer != "word" or vocab_size < 3):
        raise ValueError(
            f"task.options.vocab_size is {vocab_size} with task.options.tokenizer {tokenizer!r}: it is the number of "
            "words at word level, at least 3; leave it empty for another tokenizer"
        )
