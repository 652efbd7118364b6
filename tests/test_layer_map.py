"""Layer lists, execution order, the even map, globs and collisions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import resnet18, resnet50

from scale_guide import layer_pairs
from scale_guide.layer_map import Layer, candidates, make_pairs, trace, trace_layers
from scale_guide.layer_weights import weigh
from scale_guide.models import deep_fcn, plain_resnet, rnn, transformer, wide_fcn
from scale_guide.statistics import Pair


def on_meta(
    build: Any, *shape: int, layers: str = "weights", dtype: torch.dtype | None = None, **options: Any
) -> list[Layer]:
    with torch.device("meta"):
        model = build(**options)
        return trace_layers(model, torch.empty(shape, dtype=dtype), layers)


def test_even_map_of_the_paper() -> None:
    """PAPER.md section 3: ResNet-18 -> Deep FCN over the released layers."""
    expected = [0, 2, 5, 7, 9, 12, 14, 16, 19, 21, 24, 26, 28, 31, 33, 35, 38, 40, 42, 45, 47]
    assert layer_pairs(21, 48) == list(enumerate(expected))


def test_even_map_edges() -> None:
    assert layer_pairs(1, 5) == [(0, 0)]
    assert layer_pairs(3, 1) == [(0, 0), (1, 0), (2, 0)]
    assert layer_pairs(3, 2) == [(0, 0), (1, 0), (2, 1)]  # 0.5 rounds half to even
    assert layer_pairs(5, 5) == [(i, i) for i in range(5)]
    with pytest.raises(ValueError, match="at least one layer"):
        layer_pairs(0, 3)


def test_released_layer_counts() -> None:
    """21 guide layers of ResNet-18, 54 of ResNet-50, 48 target layers of the Deep FCN: logits dropped."""
    assert len(on_meta(resnet18, 2, 3, 64, 64, layers="released")) == 21
    assert len(on_meta(resnet50, 2, 3, 64, 64, layers="released")) == 54
    fcn = {"num_classes": 10, "input_shape": (3, 32, 32), "depth": 48, "first_width": 64, "width": 32}
    assert len(on_meta(deep_fcn.build, 2, 3, 32, 32, layers="released", **fcn)) == 48


@pytest.mark.parametrize(
    ("guide", "num_guide", "target", "num_target", "num_summed"),
    [
        (resnet18, 21, deep_fcn.build, 48, 21),
        (resnet18, 21, wide_fcn.build, 3, 3),
        (resnet50, 54, plain_resnet.build, 50, 50),
    ],
)
def test_released_pairs_of_the_papers_rows(
    guide: Any, num_guide: int, target: Any, num_target: int, num_summed: int
) -> None:
    """At paper size, on meta tensors (PAPER.md section 3): l, t, pairs, and the terms the released code sums."""
    options = {} if target is plain_resnet.build else {"input_shape": (3, 224, 224)}
    with torch.device("meta"):
        networks = target(num_classes=1000, **options), guide(num_classes=1000)
        for collision, num_pairs in (("sum", num_guide), ("last", num_summed)):
            layers = trace(
                *networks,
                torch.empty(2, 3, 224, 224),
                target_layers="released",
                guide_layers="released",
                collision=collision,
            )
            assert (len(layers.guide), len(layers.target)) == (num_guide, num_target)
            assert len(layers.pairs) == num_pairs


def test_execution_order_not_definition_order() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = nn.Linear(3, 5), nn.Linear(2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x)).relu()

    layers = trace_layers(Reversed(), torch.zeros(4, 2), "weights")
    assert [(layer.name, layer.shape) for layer in layers] == [("first", (3,)), ("second", (5,))]


def test_sequence_models() -> None:
    recurrent = on_meta(rnn.build, 2, 7, layers="blocks", dtype=torch.long, vocab_size=11, embedding=8, hidden=16)
    assert [layer.width for layer in recurrent] == [7 * 16] * 4


def test_weight_tying_gives_one_activation_per_fire() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.shared(self.shared(x)))

    assert [layer.name for layer in trace_layers(Twice(), torch.zeros(2, 4), "weights")] == ["shared", "shared#2"]
    assert [layer.name for layer in trace_layers(Twice(), torch.zeros(2, 4), ["shared#2"])] == ["shared#2"]


def test_globs_and_explicit_pairs() -> None:
    target, guide = ["a.0", "a.1", "b"], ["x.0", "x.1", "y"]
    assert make_pairs([["a.*", "x.*"]], target, guide) == [Pair("a.0", "x.0"), Pair("a.1", "x.1")]
    assert make_pairs([["b", "x.*"]], target, guide) == [Pair("b", "x.0"), Pair("b", "x.1")]
    assert make_pairs([["b", "x.*"]], target, guide, "last") == [Pair("b", "x.1")]
    assert make_pairs([["b", "x.*"]], target, guide, "mean") == [Pair("b", "x.0", 0.5), Pair("b", "x.1", 0.5)]
    with pytest.raises(ValueError, match=r"matches 3 target layers but 'x\.\*' matches 2"):
        make_pairs([["*", "x.*"]], target, guide)
    with pytest.raises(ValueError, match=r"did you mean 'a\.1'"):
        make_pairs([["a.11", "y"]], target, guide)
    with pytest.raises(ValueError, match=r"\[target layer, guide layer\]"):
        make_pairs([["a.0"]], target, guide)


def test_unknown_lists_and_layers() -> None:
    with pytest.raises(ValueError, match="did you mean 'blocks'"):
        candidates(nn.Linear(2, 2), "block")
    with pytest.raises(ValueError, match="did you mean 'layer1"):
        candidates(resnet18(), ["layer11"])
    with pytest.raises(ValueError, match="finds no layer"):
        candidates(nn.ReLU(), "weights")


def test_trace_refuses_no_pairs_and_unequal_rows() -> None:
    with torch.device("meta"):
        target, guide = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)), nn.Sequential(nn.Linear(6, 3))
        with pytest.raises(ValueError, match=r"no pairs between 1 target and 0 guide"):
            trace(target, guide, torch.empty(4, 6))
        words = rnn.build(vocab_size=11)
        other = transformer.build(vocab_size=11, max_length=12, width=16, heads=2, layers=2)
        pooled = nn.Sequential(nn.Embedding(11, 4), nn.Flatten(), nn.Linear(28, 3), nn.Linear(3, 2))
        inputs = torch.empty(2, 7, dtype=torch.long)
        assert trace(words, other, inputs, target_layers="blocks", guide_layers="blocks", rows="token").pairs
        with pytest.raises(ValueError, match=r"7 rows but the guide layer '2' 1 for each example"):
            trace(words, pooled, inputs, rows="token")


def test_layer_weights() -> None:
    """Names go before globs; a factor acts on every pair of its target layer; 0 drops them."""
    pairs = [Pair("a.0", "x"), Pair("a.1", "x", 0.5), Pair("a.1#2", "x"), Pair("b", "x"), Pair("b", "y")]
    assert weigh(pairs, {}) == pairs
    assert [pair.weight for pair in weigh(pairs, {"a.*": 3, "a.0": 0.25, "b": 2})] == [0.25, 1.5, 3, 2, 2]
    assert [pair.weight for pair in weigh(pairs, {"a.1": 4})] == [1, 2, 4, 1, 1], "a name means all its fires"
    assert [pair.weight for pair in weigh(pairs, {"a.1": 4, "a.1#2": 5})] == [1, 2, 5, 1, 1]
    assert weigh(pairs, {"*": 0, "a.0": 1}) == [Pair("a.0", "x")]
    with pytest.raises(ValueError, match=r"did you mean 'a\.1'\?\)\. Known: a\.0, a\.1, a\.1#2, b\."):
        weigh(pairs, {"a.11": 2})
    with pytest.raises(ValueError, match=r"'a\.\*' and '\*' both match the target layer 'a\.0'"):
        weigh(pairs, {"a.*": 2, "*": 1})
    for factor in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"'b' has factor .* 0 or more"):
            weigh(pairs, {"b": factor})
    with pytest.raises(ValueError, match="leaves no pair"):
        weigh(pairs, {"*": 0})


def test_layer_weights_work_on_even_pairs_and_leave_dropped_ones_out_of_everything() -> None:
    with torch.device("meta"):
        words, inputs = rnn.build(vocab_size=11), torch.empty(2, 7, dtype=torch.long)
        pooled = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 3), nn.Flatten(), nn.Linear(21, 3), nn.Linear(3, 2))
        lists = {"target_layers": "blocks", "guide_layers": ["1", "3"], "rows": "token"}
        with pytest.raises(ValueError, match=r"7 rows but the guide layer '3' 1"):
            trace(words, pooled, inputs, **lists)
        layers = trace(words, pooled, inputs, layer_weights={"layers.0": 0.5, "layers.3": 0}, **lists)
    assert layers.pairs == (Pair("layers.0", "1", 0.5),)
