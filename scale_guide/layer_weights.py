"""Factors on the weights of layer pairs, by the name of the target layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from scale_guide.activations import means
from scale_guide.lookup import unknown
from scale_guide.statistics import Pair


def weigh(pairs: Sequence[Pair], factors: Mapping[str, float]) -> list[Pair]:
    """Returns the pairs, the weight of each times the factor of its target layer; those of factor 0 are left out.

    Args:
        pairs: As `make_pairs` gives them.
        factors: Target layer, a name or a glob -> factor. A name goes before a glob; what none matches has factor 1.

    Raises:
        ValueError: a name or glob that matches no paired layer, two globs for one layer, a factor that is negative or
            not finite, or no pair left.
    """
    layers = list(dict.fromkeys(pair.target for pair in pairs))
    for wanted, factor in factors.items():
        if not any(means(wanted, layer) for layer in layers):
            raise unknown("guidance.layer_weights: paired target layer", wanted, layers)
        if not (math.isfinite(factor) and factor >= 0):
            raise ValueError(
                f"guidance.layer_weights: {wanted!r} has factor {factor}; it must be a finite number, 0 or more. Give "
                "0 to leave the layer out."
            )
    found = {layer: _factor(layer, factors) for layer in layers}
    weighed = [replace(p, weight=p.weight * found[p.target]) for p in pairs if found[p.target]]
    if not weighed:
        raise ValueError(
            "guidance.layer_weights leaves no pair: every factor is 0. Leave some layer above 0, or give "
            "guidance.weight 0 for no guidance."
        )
    return weighed


def _factor(layer: str, factors: Mapping[str, float]) -> float:
    if layer in factors:
        return factors[layer]
    found = [wanted for wanted in factors if means(wanted, layer)]
    if len(found) > 1:
        raise ValueError(
            f"guidance.layer_weights: {found[0]!r} and {found[1]!r} both match the target layer {layer!r}. Name that "
            "layer itself, or make the globs match different layers."
        )
    return factors[found[0]] if found else 1.0
