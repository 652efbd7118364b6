"""One network's guided layers -> their rows of a micro-batch: hooks, selection and preparation joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from scale_guide.activations import Recorder
from scale_guide.layer_map import candidates, guidable
from scale_guide.objective import Similarity
from scale_guide.rows import How, select
from scale_guide.statistics import Padding, Side


@dataclass
class LayerRows:
    """Rows [n, d] by layer, their weights [n] (None: all count), and which positions of the sequences are real."""

    rows: dict[str, Tensor] = field(default_factory=dict)
    weights: Tensor | None = None
    padding: Padding | None = None


class LayerReader:
    """Reads the rows of one network's layers while it runs.

    Args:
        side: Which of the two networks it is.
        model: The network, unwrapped.
        layers: weights | blocks | released | a list of names or globs.
        how: What one row is.
        similarity: Prepares the rows.
        overwritten: Layers known to be overwritten in place; None: found out in the first pass.

    Attributes:
        recorder: The hooks.

    Raises:
        ValueError: an unknown layer list or layer.
    """

    def __init__(
        self,
        side: Side,
        model: nn.Module,
        layers: str | Sequence[str],
        *,
        how: How,
        similarity: Similarity,
        overwritten: Sequence[str] | None = None,
    ) -> None:
        self.recorder = Recorder(model, candidates(model, layers), overwritten=overwritten)
        self._side, self._layers, self._how, self._similarity = side, layers, how, similarity

    def take(self, *, weights: Tensor | None, mask: Tensor | None, needs_graph: bool = False) -> LayerRows:
        """Returns the rows of what was recorded, in execution order; the arguments are those of `Guidance.record`.

        Raises:
            ValueError: a layer that did not run or carries no gradient, or a mask that does not fit.
        """
        fired = self.recorder.take(needs_graph=needs_graph)
        names = guidable(fired, self._layers) if self.recorder.keep is None else fired
        result, padded = LayerRows(), set()
        for name in names:
            activation = fired[name]
            chosen = select(
                activation.output, self._how, mask=mask, weights=weights, channels_first=activation.channels_first
            )
            result.rows[name], result.weights = self._similarity.prepare(chosen.rows), chosen.weights
            if chosen.mask is not None:
                padded.add((self._side, name))
        if mask is not None and self._how == "flatten":
            result.padding = Padding(mask, frozenset(padded))
        return result
