"""How strong guidance is beside the rest of the loss: norms of the gradients that meet at the guided layers."""

from __future__ import annotations

import torch
from torch import Tensor


class GradientWatch:
    """Adds up squared norms during backward: of what guidance hands to layers, and of what reaches them from above.

    From above come the task's gradient and that of later layers' guidance, which backward does not keep apart. Both
    sums carry the loss scale of fp16, so only their ratio says something.

    Attributes:
        is_on: Whether layers recorded from now on are watched; it costs a copy of one layer's gradient at a time.
    """

    def __init__(self) -> None:
        self.is_on = False
        self._sums: list[Tensor] = []

    def reset(self) -> None:
        """Forgets the sums."""
        self._sums = []

    def sums(self) -> tuple[float, float]:
        """Returns both sums since `reset`: of what came from guidance, and from above; zeros if none was watched."""
        totals = torch.stack(self._sums).sum(dim=0).tolist() if self._sums else [0.0, 0.0]
        return totals[0], totals[1]

    def branch(self, output: Tensor, kept: Tensor) -> Tensor:
        """Returns `kept` for guidance to read, with both kinds of gradient watched.

        Args:
            output: What a layer hands on to the next one.
            kept: The same tensor, or the copy of it that guidance reads.
        """
        handed: list[Tensor] = []
        branch = kept.view_as(kept)
        branch.register_hook(handed.append)  # type: ignore[no-untyped-call]

        def arrived(gradient: Tensor) -> None:
            # Guidance's part is there by now: autograd joins all parts before it calls the hooks of a tensor.
            own = handed.pop() if handed else torch.zeros_like(gradient)
            parts = own.float(), gradient.float() - own.float()
            self._sums.append(torch.stack([part.square().sum() for part in parts]))

        output.register_hook(arrived)  # type: ignore[no-untyped-call]
        return branch
