"""Which layers exist, in which order they run, and which target layer is paired with which guide layer."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scale_guide.activations import Recorder, means
from scale_guide.layer_weights import weigh
from scale_guide.lookup import unknown
from scale_guide.rows import How, select
from scale_guide.statistics import Node, Pair, Side

Collision = Literal["sum", "last", "mean"]
PairSpec = str | Sequence[Sequence[str]]
_RELEASED = (
    *(nn.modules.conv._ConvNd, nn.Linear, nn.AdaptiveAvgPool2d, nn.LSTM, nn.RNN),
    *(nn.TransformerDecoderLayer, nn.LayerNorm, nn.MultiheadAttention),
)
LISTS = ("weights", "blocks", "released")


@dataclass(frozen=True)
class Layer:
    """A traced layer: name (`name#2` for a second fire), shape of one example's output, its rows and their width."""

    name: str
    shape: tuple[int, ...]
    width: int
    num_rows: int
    overwritten: bool


@dataclass(frozen=True)
class LayerMap:
    """The layers of both networks in execution order, and the pairs between them."""

    target: tuple[Layer, ...]
    guide: tuple[Layer, ...]
    pairs: tuple[Pair, ...]

    @property
    def overwritten(self) -> tuple[list[str], list[str]]:
        """The target's and the guide's layers whose output a later in-place module overwrites."""
        ours, theirs = ([layer.name for layer in side if layer.overwritten] for side in (self.target, self.guide))
        return ours, theirs

    @property
    def widths(self) -> dict[Node, int]:
        """The number of columns of every layer's rows."""
        ours: dict[Node, int] = {("target", layer.name): layer.width for layer in self.target}
        return ours | {("guide", layer.name): layer.width for layer in self.guide}

    @property
    def rows_per_example(self) -> int:
        """The rows that one example gives, 1 unless tokens or positions are rows."""
        return max(layer.num_rows for layer in self.target)

    @property
    def has_sequences(self) -> bool:
        """Whether a paired layer gives sequences [T, d], whose padding a mask may mark."""
        paired = {node for pair in self.pairs for node in pair.nodes}
        sides: tuple[tuple[Side, tuple[Layer, ...]], ...] = (("target", self.target), ("guide", self.guide))
        return any((side, la.name) in paired and len(la.shape) == 2 for side, layers in sides for la in layers)


def layer_pairs(num_guide: int, num_target: int) -> list[tuple[int, int]]:
    """Returns [(guide index, target index), ...], one per guide layer: the paper's even spread (Algorithm 1).

    Guide layer i of l goes to target layer min(round_half_even(i * step), t - 1) of t, step = (t - 1) / (l - 1), or 1
    if l = 1 (as PAPER section 3 corrects the text).

    Raises:
        ValueError: fewer than one layer on either side.
    """
    if num_guide < 1 or num_target < 1:
        raise ValueError(
            f"layer_pairs needs at least one layer on each side, got {num_guide} guide, {num_target} target."
        )
    step = Fraction(num_target - 1, num_guide - 1) if num_guide > 1 else Fraction(1)
    return [(i, min(round(i * step), num_target - 1)) for i in range(num_guide)]


def candidates(model: nn.Module, layers: str | Sequence[str]) -> list[str]:
    """Returns the names of modules that a layer list can mean, in the order they are defined.

    Args:
        model: Any module.
        layers: `weights`: modules with weights (convolution, linear, recurrent) and whole recurrent or attention
            blocks.
            `blocks`: the members of stacks of alike modules. `released`: what the authors' code records. Or a list of
            names or globs.

    Raises:
        ValueError: a list name, module name or glob that matches nothing.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if not isinstance(layers, str):
        chosen = {name for wanted in layers for name in _match(wanted.partition("#")[0], list(modules))}
        return [name for name in modules if name in chosen]
    if layers not in LISTS:
        raise unknown("layers", layers, [*LISTS, "or a list of names and globs"])
    blocks = set(_blocks(model))
    if layers == "blocks":
        found = [name for name in modules if name in blocks]
    elif layers == "released":
        found = [name for name, module in modules.items() if isinstance(module, _RELEASED)]
    else:
        found = [n for n, m in modules.items() if has_weights(m) or (n in blocks and _is_sequence_block(m))]
    if not found:
        raise ValueError(
            f"layers={layers!r} finds no layer in {type(model).__name__}. Give a list of module names or globs."
        )
    return found


def has_weights(module: nn.Module) -> bool:
    """Returns whether the module itself multiplies by a weight matrix (convolution, linear, recurrent)."""
    # The last is the out_proj of nn.MultiheadAttention, which reads its weight and never calls it.
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag, nn.modules.linear.NonDynamicallyQuantizableLinear)):
        return False
    own = module.named_parameters(recurse=False)
    # ZeRO-3 leaves an empty vector in place of a partitioned parameter and keeps its shape aside.
    return any("weight" in name and len(getattr(p, "ds_shape", p.shape)) >= 2 for name, p in own)


def _blocks(model: nn.Module) -> list[str]:
    found = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        alike = len({type(child) for child in children.values()}) == 1
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and alike and any(True for _ in module.parameters()):
            found += [f"{name}.{child}" if name else child for child in children]
    return found


def _is_sequence_block(module: nn.Module) -> bool:
    kinds = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
    return any(isinstance(m, kinds) or type(m).__name__.endswith("Attention") for m in module.modules())


def _match(wanted: str, names: Sequence[str]) -> list[str]:
    found = [name for name in names if name == wanted] or [name for name in names if fnmatch.fnmatchcase(name, wanted)]
    if not found:
        raise unknown("layer", wanted, names)
    return found


def make_pairs(
    spec: PairSpec | Sequence[Pair], target: Sequence[str], guide: Sequence[str], collision: Collision = "sum"
) -> list[Pair]:
    """Returns the pairs between two lists of layer names in execution order.

    Args:
        spec: even, or a list of [target, guide], each a name or a glob. Two globs that match equally many layers are
            paired in order; one layer is paired with all that the other side matches. Or ready pairs.
        target: Names of the target layers.
        guide: Names of the guide layers.
        collision: What becomes of several guide layers on one target layer: sum, last or mean.

    Raises:
        ValueError: an unknown layer, globs that match different numbers of layers, or no pairs at all.
    """
    pairs: list[Pair] = []
    if isinstance(spec, str):
        if spec != "even":
            raise ValueError(
                f"guidance.pairs={spec!r} is not known. Give even, or a list of [target layer, guide layer]."
            )
        if target and guide:
            pairs = [Pair(target[t], guide[g]) for g, t in layer_pairs(len(guide), len(target))]
    for item in () if isinstance(spec, str) else spec:
        pairs += [item] if isinstance(item, Pair) else _expand(item, target, guide)
    if not pairs:
        raise ValueError(
            f"guidance.pairs gives no pairs between {len(target)} target and {len(guide)} guide layers. Run "
            "`scale-guide layers` to see both lists, and choose target.layers and guide.layers that are not empty."
        )
    on = {pair.target: [p for p in pairs if p.target == pair.target] for pair in pairs}
    if collision == "last":
        return [same[-1] for same in on.values()]
    if collision == "mean":
        return [Pair(p.target, p.guide, p.weight / len(on[p.target])) for p in pairs]
    return pairs


def _expand(item: Sequence[str], target: Sequence[str], guide: Sequence[str]) -> list[Pair]:
    if len(item) != 2:
        raise ValueError(f"guidance.pairs holds {list(item)!r}: each entry must be [target layer, guide layer].")
    ours, theirs = _match(item[0], target), _match(item[1], guide)
    if len(ours) == 1 or len(theirs) == 1:
        return [Pair(t, g) for t in ours for g in theirs]
    if len(ours) != len(theirs):
        raise ValueError(
            f"guidance.pairs: {item[0]!r} matches {len(ours)} target layers but {item[1]!r} "
            f"matches {len(theirs)} guide layers, so they cannot be paired in order. Make the globs match "
            "equally many, or one layer on one side."
        )
    return [Pair(t, g) for t, g in zip(ours, theirs, strict=True)]


def guidable(fired: dict[str, Any], layers: str | Sequence[str]) -> list[str]:
    """Returns which fires of a forward pass may be paired: all that a user lists; of the standing lists, no logits."""
    if not isinstance(layers, str):
        return [name for name in fired if any(means(wanted, name) for wanted in layers)]
    return [name for name, activation in fired.items() if not activation.is_model_output]


def trace_layers(model: nn.Module, inputs: Any, layers: str | Sequence[str], rows: How = "flatten") -> list[Layer]:
    """Returns the layers of a list in execution order, with shapes, from one forward pass without gradient.

    Build the model under `torch.device("meta")` and give inputs on `meta`: then nothing is computed or allocated.
    """
    recorder = Recorder(model, candidates(model, layers))
    try:
        with torch.no_grad(), recorder.record():
            model(inputs)
        fired = recorder.take()
    finally:
        recorder.close()
    traced = []
    for name in guidable(fired, layers):
        output = fired[name].output
        chosen = select(output, rows, channels_first=fired[name].channels_first).rows
        shape, num_rows = tuple(output.shape[1:]), len(chosen) // len(output)
        traced.append(Layer(name, shape, chosen.shape[1], num_rows, fired[name].overwritten))
    return traced


def trace(
    target: nn.Module,
    guide: nn.Module,
    inputs: Tensor,
    *,
    target_layers: str | Sequence[str] = "weights",
    guide_layers: str | Sequence[str] = "weights",
    pairs: PairSpec = "even",
    collision: Collision = "sum",
    layer_weights: Mapping[str, float] | None = None,
    rows: How = "flatten",
) -> LayerMap:
    """Returns both layer lists and the pairs, from one forward pass of each network; see `trace_layers`.

    Raises:
        ValueError: an unknown layer, no pairs, factors that do not fit, or paired layers whose numbers of rows differ.
    """
    ours = trace_layers(target.train(), inputs, target_layers, rows)
    theirs = trace_layers(guide.eval(), inputs, guide_layers, rows)
    made = make_pairs(pairs, [layer.name for layer in ours], [layer.name for layer in theirs], collision)
    made = weigh(made, layer_weights or {})
    num_rows = {("target", x.name): x.num_rows for x in ours} | {("guide", x.name): x.num_rows for x in theirs}
    for pair in made:
        x, y = (num_rows[node] for node in pair.nodes)
        if x != y:
            raise ValueError(
                f"guidance.rows={rows!r} gives the target layer {pair.target!r} {x} rows but the guide layer "
                f"{pair.guide!r} {y} for each example. Choose rows flatten, mean or last, or layers of equal length."
            )
    return LayerMap(tuple(ours), tuple(theirs), tuple(made))
