"""Logit distillation, a control: the target is pulled towards the guide's output instead of its representations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

from scale_guide.guide import Guide
from scale_guide.tasks import logits


@dataclass(frozen=True)
class Distillation:
    """weight * T^2 * KL(guide || target) between softmaxes at temperature T (Hinton et al. 2015)."""

    guide: Guide
    """Gives the logits; the one whose layers guide, if any do."""
    weight: float
    """Of the sum beside the task's."""
    temperature: float = 1.0
    """T; the factor T^2 keeps the gradient's size."""

    def loss(self, output: Any, guide_output: Any, scored: Tensor) -> Tensor:
        """Returns the weighted sum over scored terms, in nats: a scalar, differentiable in the target's output.

        Args:
            output: The target's: logits [B, C] or [B, T, C], or anything with `.logits`.
            guide_output: The guide's, alike; on any device.
            scored: Weight of each term, [B] or [B, T], from `Task.scored`.
        """
        ours = logits(output)
        theirs = logits(guide_output).to(ours)
        pair = (ours / self.temperature).log_softmax(-1), (theirs / self.temperature).softmax(-1)
        terms = functional.kl_div(*pair, reduction="none").sum(-1)
        return self.weight * self.temperature**2 * (terms * scored).sum()


def check_alike(target: Any, guide: Any, scored: Tensor) -> None:
    """Checks that the outputs of both networks can be compared term by term.

    Raises:
        ValueError: no logits, or logits of other classes or positions.
    """
    shapes = []
    for name, output in (("target", target), ("guide", guide)):
        values = getattr(output, "logits", output)
        if not isinstance(values, Tensor):
            raise ValueError(
                f"guidance.distillation compares logits, and the {name} gives a {type(output).__name__}. Choose a "
                f"{name}.name whose output is a tensor or has .logits, or set guidance.distillation 0."
            )
        shapes.append(tuple(values.shape))
    ours, theirs = shapes
    if ours == theirs and ours[:-1] == tuple(scored.shape):
        return
    raise ValueError(
        f"guidance.distillation compares logits term by term, and for {tuple(scored.shape)} scored terms the target "
        f"gives {ours} and the guide {theirs}. Make them alike, as by guide.options.num_classes, or set "
        "guidance.distillation 0."
    )
