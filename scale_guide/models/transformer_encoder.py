"""A Transformer encoder of the BERT kind, from `transformers`, that labels whole sequences (PAPER.md section 2)."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import BertConfig, BertModel

from scale_guide.models import check_heads, check_length


class SequenceClassifier(nn.Module):
    """BERT's encoder, the mean over a sequence's real tokens, and a linear head."""

    def __init__(self, config: BertConfig, num_classes: int, padding_id: int) -> None:
        super().__init__()
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(config.hidden_size, num_classes)
        self.padding_id = padding_id

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, num_classes] from tokens [B, T]; padding has no part in them.

        Raises:
            ValueError: T above max_length.
        """
        check_length("transformer_encoder", tokens.shape[1], self.bert.config.max_position_embeddings)
        real = tokens != self.padding_id
        # As wide as the attention itself: of a mask [B, T] transformers looks at the values, which waits for the GPU.
        mask = real[:, None, None, :].expand(-1, 1, tokens.shape[1], -1)
        hidden = self.bert(tokens, attention_mask=mask).last_hidden_state
        weights = real.to(hidden.dtype)[:, :, None]
        logits: Tensor = self.head((hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1))
        return logits


def build(
    *,
    vocab_size: int,
    num_classes: int,
    max_length: int,
    padding_id: int,
    layers: int = 1,
    width: int = 512,
    heads: int = 16,
    feedforward: int = 512,
    dropout: float = 0.0,
) -> SequenceClassifier:
    """Initialised Transformer encoder for sequences of at most max_length tokens; by default the paper's for parity.

    Raises:
        ValueError: heads that do not divide the width.
    """
    check_heads("transformer_encoder", heads, width)
    config = BertConfig(
        vocab_size=vocab_size,
        max_position_embeddings=max_length,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=feedforward,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=padding_id,
    )
    return SequenceClassifier(config, num_classes, padding_id)
