"""A causal Transformer of the GPT-2 kind, from `transformers`, by its configuration: no weights are downloaded."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from scale_guide.models import check_heads, check_length


class CausalTransformer(nn.Module):
    """GPT-2 that takes tokens and returns logits. Its input embedding and its head have weights of their own."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.gpt2 = GPT2LMHeadModel(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, vocab_size] from tokens [B, T]; position t sees tokens 0..t.

        Raises:
            ValueError: T above max_length.
        """
        length = tokens.shape[1]
        check_length("transformer", length, self.gpt2.config.n_positions)
        # Without a mask transformers looks for packed sequences in the values of position_ids: that cannot run on
        # meta tensors, and waits for the GPU in every forward.
        mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        logits: Tensor = self.gpt2(tokens, attention_mask=mask[None, None]).logits
        return logits


def build(
    *,
    vocab_size: int,
    max_length: int,
    layers: int = 4,
    width: int = 512,
    heads: int = 16,
    feedforward: int = 2048,
    dropout: float = 0.0,
) -> CausalTransformer:
    """Initialised causal Transformer for at most max_length tokens; by default the paper's guide for LM.

    Raises:
        ValueError: heads that do not divide the width.
    """
    check_heads("transformer", heads, width)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=max_length,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_inner=feedforward,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        # GPT-2's own ids lie outside a small vocabulary, of which transformers would warn.
        bos_token_id=vocab_size - 1,
        eos_token_id=vocab_size - 1,
        # Own weights as in the paper; and shared ones cannot be written to one safetensors file.
        tie_word_embeddings=False,
        use_cache=False,
    )
    return CausalTransformer(config)
