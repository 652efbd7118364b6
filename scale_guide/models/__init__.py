"""Models: a file's name is the model's name on the command line; its `build` returns an `nn.Module`.

`forward` takes a batch's `input` and returns logits, or anything with `.logits`. Models also run on meta tensors,
since layers and plans are traced there.
"""

from __future__ import annotations


def check_heads(model: str, heads: int, width: int) -> None:
    """Checks the number of attention heads of `model`.

    Raises:
        ValueError: heads do not divide the width; names the nearest that do.
    """
    if heads < 1 or width % heads:
        nearest = min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(n - heads))
        raise ValueError(
            f"heads of {model} is {heads} and width is {width}: heads must divide width; set heads to {nearest}"
        )


def check_length(model: str, length: int, max_length: int) -> None:
    """Checks that sequences fit the positions that `model` has learned embeddings for.

    Raises:
        ValueError: they are longer.
    """
    if length > max_length:
        raise ValueError(
            f"max_length of {model} is {max_length}, but the sequences have {length} tokens: set it to at least "
            f"{length}, leave it to the task, or shorten the sequences"
        )
