"""A layer's output -> rows [n, d]: what counts as one row when two layers are compared."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

How = Literal["flatten", "token", "mean", "last"]


def select(
    output: Tensor,
    how: How,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    channels_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns the rows [n, d] of one layer's output and their weights [n] (None: all count).

    Args:
        output: [B, d]; sequences [B, T, d]; maps [B, C, H, W] with `channels_first`.
        how: flatten: one row per example, [B, T * d] (the papers). token: one row per token or position, [B * T, d].
            mean: over the positions, [B, d]. last: the last valid position, [B, d].
        mask: True for real tokens [B, T]. Read by token, mean and last; flatten keeps padding, as the papers do.
        weights: 1 or 0 for each example [B].
        channels_first: The features are axis 1, the positions follow.

    Raises:
        ValueError: a mask whose length is not that of the output.
    """
    if output.dim() <= 2 or how == "flatten":
        return output.flatten(1) if output.dim() > 1 else output[:, None], weights
    positions = output.movedim(1, -1) if channels_first else output
    positions = positions.flatten(1, -2)
    if mask is None or channels_first:
        mask = None
    elif mask.shape != positions.shape[:2]:
        raise ValueError(
            f"guidance.rows={how!r}: the mask has shape {tuple(mask.shape)} but a layer gives {positions.shape[0]} "
            f"sequences of {positions.shape[1]} positions. Guide layers that keep the sequence as it is, or use rows: "
            "flatten."
        )
    if how == "token":
        return positions.flatten(0, 1), _token_weights(positions, mask, weights)
    if how == "mean":
        if mask is None:
            return positions.mean(dim=1), weights
        share = mask.to(positions.dtype) / mask.sum(dim=1, keepdim=True).clamp_min(1)
        return torch.einsum("btd,bt->bd", positions, share), weights
    if mask is None:
        return positions[:, -1], weights
    index = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, index, 0).argmax(dim=1)
    return positions[torch.arange(len(positions), device=positions.device), last], weights


def _token_weights(positions: Tensor, mask: Tensor | None, weights: Tensor | None) -> Tensor | None:
    if mask is None and weights is None:
        return None
    ones = torch.ones(positions.shape[:2], device=positions.device)
    if mask is not None:
        ones = ones * mask
    if weights is not None:
        ones = ones * weights[:, None].to(ones)
    return ones.flatten()
