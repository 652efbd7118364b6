"""Language modelling: predict the next token of a text cut into contexts (PAPER.md sections 1 and 2).

The tokens of a split are one stream. Context number c reads tokens cT .. cT + T - 1 and predicts tokens
cT + 1 .. cT + T, so every token but the first is predicted once, up to the last whole context. No state is carried
from one context to the next.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from scale_guide.tasks import Batch, logits, ratio, stack, token_losses
from scale_guide.tasks._text import TextTokenizer, Tokens, WordTokenizer, data_error, find_text, load_tokenizer


class TextData:
    """Contexts of `context_length` tokens: samples of `input` and `target` [T], `words` and `weight`."""

    def __init__(self, tokens: Tokens, context_length: int) -> None:
        self.ids = tokens.ids
        self.context_length = context_length
        # Words that begin among the targets of context c: tokens cT + 1 .. cT + T.
        self.words = tokens.words_before[1::context_length].diff()

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Context number `index`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.context_length
        ids = self.ids[start : start + self.context_length + 1].long()
        return {"input": ids[:-1], "target": ids[1:], "words": self.words[index], "weight": torch.ones(())}


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

    def count(self, batch: Batch) -> Tensor:
        """Number of predicted tokens, float64 scalar."""
        return batch["weight"].sum(dtype=torch.float64) * batch["target"].shape[1]

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Sum of the cross-entropy over predicted tokens, in nats."""
        return (token_losses(logits(output), batch["target"]) * batch["weight"][:, None]).sum()

    @torch.no_grad()
    def scores(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """Sums: loss in nats, tokens, words."""
        losses = token_losses(logits(output), batch["target"]) * batch["weight"][:, None]
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
    *, data: str, tokenizer: str = "word", vocab_size: int | None = None, context_length: int = 75
) -> LanguageModeling:
    """Language modelling on text files.

    Args:
        data: A folder with train.txt and valid.txt (or validation, val, dev, test; several files a split are joined),
            or one file, whose last tenth of lines validates.
        tokenizer: word (the training text's words split at spaces, <eos> at each line's end), a folder with a
            tokenizer, or the name of one on the hub.
        vocab_size: Words kept at word level, <eos> and <unk> included; empty: all. Scores of different sizes do not
            compare: each <unk> counts as a word, and is easy.
        context_length: Tokens that one sample reads; the paper takes 75.

    Raises:
        ValueError: no text, too little of it, or no tokenizer.
    """
    if context_length < 1:
        raise ValueError(f"task.options.context_length is {context_length}: it must be at least 1; the paper takes 75")
    if vocab_size is not None and (tokenizer != "word" or vocab_size < 3):
        raise ValueError(
            f"task.options.vocab_size is {vocab_size} with task.options.tokenizer {tokenizer!r}: it is the number of "
            "words at word level, at least 3; leave it empty for another tokenizer"
        )
    train, validation = find_text(data)
    encoder: TextTokenizer = WordTokenizer(train, vocab_size) if tokenizer == "word" else load_tokenizer(tokenizer)
    parts = []
    for split, lines in (("training", train), ("validation", validation)):
        tokens = encoder.encode(lines)
        if len(tokens.ids) <= context_length:
            raise data_error(
                data,
                f"its {split} text has {len(tokens.ids)} tokens, and one context needs {context_length + 1}",
                "give more text, or set task.options.context_length lower",
            )
        parts.append(TextData(tokens, context_length))
    return LanguageModeling(parts[0], parts[1], encoder.vocab_size)
