"""A stacked recurrent network that reads a sequence of tokens and is causal (PAPER.md sections 2 and 4)."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from scale_guide.lookup import unknown

CELLS: dict[str, type[nn.RNN | nn.LSTM | nn.GRU]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class StackedRNN(nn.Module):
    """Embedding, one-layer recurrent modules and a linear head.

    The stack is a list of one-layer modules because a module of several layers fires one hook, for its last layer.
    """

    def __init__(
        self, embedding: nn.Embedding, layers: nn.ModuleList, head: nn.Linear, *, dropout: float, leaky_state: bool
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.layers = layers
        self.dropout = nn.Dropout(dropout)
        self.head = head
        self.leaky_state = leaky_state

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, vocab_size] from tokens [B, T]; position t sees tokens 0..t."""
        x: Tensor = self.dropout(self.embedding(tokens))
        state: Any = None
        for layer in self.layers:
            x, last = layer(x, state)
            x = self.dropout(x)
            state = last if self.leaky_state else None
        logits: Tensor = self.head(x)
        return logits


def build(
    *,
    vocab_size: int,
    embedding: int = 256,
    hidden: int = 512,
    layers: int = 4,
    cell: Literal["rnn", "lstm", "gru"] = "rnn",
    dropout: float = 0.0,
    leaky_state: bool = False,
) -> StackedRNN:
    """Causal stack of `layers` recurrent layers; every layer of every sequence starts from a zero state.

    `leaky_state` starts each layer from the last state of the one below, as the authors' code of 2024 did: it lets a
    position see later tokens, and is here only to compare with their numbers.

    Raises:
        ValueError: an unknown cell, or no layers.
    """
    if cell not in CELLS:
        raise unknown("rnn: cell", cell, CELLS)
    if layers < 1:
        raise ValueError(f"layers of rnn is {layers}: it must be at least 1; the paper takes 4")
    sizes = [embedding, *[hidden] * (layers - 1)]
    stack = nn.ModuleList(CELLS[cell](size, hidden, batch_first=True) for size in sizes)
    embed, head = nn.Embedding(vocab_size, embedding), nn.Linear(hidden, vocab_size)
    return StackedRNN(embed, stack, head, dropout=dropout, leaky_state=leaky_state)
