"""A layer's output -> rows [n, d]: what counts as one row when two layers are compared."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

How = Literal["flatten", "token", "mean", "last"]


class Selected(NamedTuple):
    """Rows of one layer, and which of them, or of their entries, count.

    Attributes:
        rows: [n, d].
        weights: 1 or 0 for each row [n]; None: all count.
        mask: Of flattened sequences with padding, True for real positions [n, T], d being T * width; else None.
    """

    rows: Tensor
    weights: Tensor | None
    mask: Tensor | None = None


def select(
    output: Tensor,
    how: How,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    channels_first: bool = False,
) -> Selected:
    """Returns the rows [n, d] of one layer's output, and which of them count.

    Args:
        output: [B, d]; sequences [B, T, d]; maps [B, C, H, W] with `channels_first`.
        how: flatten: one row per example, [B, T * d] (the papers); padding is zero here and gets the column's mean
            when the statistics centre. token: one row per token or position, [B * T, d]. mean: over the positions,
            [B, d]. last: the last real position, [B, d].
        mask: True for real tokens [B, T]; it concerns sequences only.
        weights: 1 or 0 for each example [B].
        channels_first: The features are axis 1, the positions follow.

    Raises:
        ValueError: a mask whose length is not that of the output.
    """
    if output.dim() <= 2:
        return Selected(output if output.dim() == 2 else output[:, None], weights)
    if channels_first:
        positions, mask = output.movedim(1, -1).flatten(1, -2), None
    else:
        positions = output.flatten(1, -2) if output.dim() > 3 else output
        _check_mask(positions, mask, how)
    if how == "flatten":
        if mask is None:
            return Selected(output.flatten(1), weights)
        return Selected(positions.masked_fill(~mask[..., None], 0).flatten(1), weights, mask)
    if how == "token":
        return Selected(positions.flatten(0, 1), _token_weights(positions, mask, weights))
    if how == "mean":
        if mask is None:
            return Selected(positions.mean(dim=1), weights)
        share = mask.to(positions.dtype) / mask.sum(dim=1, keepdim=True).clamp_min(1)
        return Selected(torch.einsum("btd,bt->bd", positions, share), weights)
    if mask is None:
        return Selected(positions[:, -1], weights)
    index = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, index, 0).argmax(dim=1)
    return Selected(positions[torch.arange(len(positions), device=positions.device), last], weights)


def _check_mask(positions: Tensor, mask: Tensor | None, how: How) -> None:
    if mask is not None and mask.shape != positions.shape[:2]:
        raise ValueError(
            f"guidance.rows={how!r}: the mask has shape {tuple(mask.shape)} but a layer gives {positions.shape[0]} "
            f"sequences of {positions.shape[1]} positions. Choose target.layers and guide.layers that keep the "
            "sequence as it is."
        )


def _token_weights(positions: Tensor, mask: Tensor | None, weights: Tensor | None) -> Tensor | None:
    if mask is None and weights is None:
        return None
    ones = torch.ones(positions.shape[:2], device=positions.device)
    if mask is not None:
        ones = ones * mask
    if weights is not None:
        ones = ones * weights[:, None].to(ones)
    return ones.flatten()
