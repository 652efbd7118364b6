"""A stacked recurrent network that reads a sequence of tokens and is causal (PAPER.md sections 2 and 4).

With a task that labels tokens it answers at every position; with one that labels sequences, at the last real token.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from scale_guide.lookup import unknown

CELLS: dict[str, type[nn.RNN | nn.LSTM | nn.GRU]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class StackedRNN(nn.Module):
    """Embedding, one-layer recurrent modules and a linear head.

    The stack is a list of one-layer modules because a module of several layers fires one hook, for its last layer.
    """

    def __init__(
        self,
        embedding: nn.Embedding,
        layers: nn.ModuleList,
        head: nn.Linear,
        *,
        dropout: float,
        leaky_state: bool,
        padding_id: int | None,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.layers = layers
        self.dropout = nn.Dropout(dropout)
        self.head = head
        self.leaky_state = leaky_state
        self.padding_id = padding_id

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, C] from tokens [B, T]; position t sees tokens 0..t. [B, C] where padding_id is given."""
        x: Tensor = self.dropout(self.embedding(tokens))
        state: Any = None
        for layer in self.layers:
            x, last = layer(x, state)
            x = self.dropout(x)
            state = last if self.leaky_state else None
        if self.padding_id is not None:
            lengths = (tokens != self.padding_id).sum(dim=1)
            x = x[torch.arange(len(x), device=x.device), lengths.clamp_min(1) - 1]
        logits: Tensor = self.head(x)
        return logits


def build(
    *,
    vocab_size: int,
    num_classes: int | None = None,
    padding_id: int | None = None,
    embedding: int = 256,
    hidden: int = 512,
    layers: int = 4,
    cell: Literal["rnn", "lstm", "gru"] = "rnn",
    dropout: float = 0.0,
    leaky_state: bool = False,
) -> StackedRNN:
    """Causal stack of `layers` recurrent layers; every layer of every sequence starts from a zero state.

    Args:
        vocab_size: Tokens that can be read, and logits of a position unless num_classes is given.
        num_classes: Labels of a sequence, for a task that has one label per sequence.
        padding_id: The token behind the end of such a sequence.
        embedding: Width of the embedding.
        hidden: Width of every layer.
        layers: Number of recurrent layers.
        cell: Of torch: rnn (tanh), lstm or gru.
        dropout: After the embedding and after every layer.
        leaky_state: Starts each layer from the last state of the one below, as the authors' code of 2024 did: it lets
            a position see later tokens, and is here only to compare with their numbers.

    Raises:
        ValueError: an unknown cell, or no layers.
    """
    if cell not in CELLS:
        raise unknown("rnn: cell", cell, CELLS)
    if layers < 1:
        raise ValueError(f"layers of rnn is {layers}: it must be at least 1; the paper takes 4")
    sizes = [embedding, *[hidden] * (layers - 1)]
    stack = nn.ModuleList(CELLS[cell](size, hidden, batch_first=True) for size in sizes)
    embed, head = nn.Embedding(vocab_size, embedding), nn.Linear(hidden, num_classes or vocab_size)
    return StackedRNN(embed, stack, head, dropout=dropout, leaky_state=leaky_state, padding_id=padding_id)
