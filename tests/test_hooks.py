"""Hooks that survive: checkpointing, torch.compile, weight tying, odd outputs, frozen layers, exceptions, copies."""

from __future__ import annotations

import copy
import io
import pickle
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import Pool
from reference import cka
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput

from scale_guide import Guidance
from scale_guide.activations import Recorder
from scale_guide.layer_map import candidates, trace_layers
from scale_guide.models import transformer

# torch looks at it while it traces, and hides the warning from everyone for whom warnings are no errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
N, K = 24, 3
Gradients = dict[str, Tensor]


class Stack(nn.Module):
    """Three blocks of linear, tanh and dropout in a loop, each perhaps under activation checkpointing, and a head."""

    def __init__(self, *, checkpointed: bool = False, reentrant: bool = False, dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = [(6, 10), (10, 10), (10, 8)]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Dropout(dropout), nn.Linear(b, b)) for a, b in sizes
        )
        self.head = nn.Linear(8, 4)
        self.checkpointed, self.reentrant = checkpointed, reentrant
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant) if self.checkpointed else block(x)
        return self.head(x)


def make_guide() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 15), nn.ReLU(), nn.Linear(15, 3)).double()


def inputs() -> Tensor:
    return torch.randn(N, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def one_step(
    guidance: Guidance, target: Callable[[Any], Any], parameters: nn.Module, x: Tensor, *, k: int = 1
) -> tuple[float, Gradients]:
    """Returns the loss and the gradients of one step of k micro-batches, each of which draws its own masks."""

    def run(j: int, part: Tensor, guide_too: bool) -> Any:
        torch.manual_seed(100 + j)
        with guidance.record():
            if guide_too:
                guidance.run_guide(part)
            return target(part)

    parts = x.chunk(k)
    parameters.zero_grad()
    if k > 1:
        for j, part in enumerate(parts):
            with torch.no_grad():
                run(j, part, True)
            guidance.collect()
        guidance.reduce()
    total = 0.0
    for j, part in enumerate(parts):
        output = run(j, part, k == 1 or guidance.needs_guide_again)
        output = output.logits if hasattr(output, "logits") else output
        loss = guidance.loss() + output.double().square().sum() / 1000
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in parameters.named_parameters() if p.grad is not None}


def assert_same(found: tuple[float, Gradients], wanted: tuple[float, Gradients], *, rtol: float = 0.0) -> None:
    """Equal bit for bit unless a tolerance is given; and the guidance reached the layers at all."""
    assert found[0] == pytest.approx(wanted[0], rel=max(rtol, 1e-15))
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=rtol, atol=0.0 if rtol == 0 else 1e-9)


# Activation checkpointing


@pytest.mark.parametrize("k", [1, K])
def test_checkpointing_in_a_loop_changes_nothing(k: int) -> None:
    """Dropout inside the checkpointed part, and two passes: equal bit for bit to no checkpointing."""
    results = []
    for checkpointed in (False, True):
        target = Stack(checkpointed=checkpointed)
        guidance = Guidance(target, make_guide(), num_micro_batches=k)
        results += [one_step(guidance, target, target, inputs(), k=k) for _ in range(2)]
    for found in results[1:]:
        assert_same(found, results[0])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of the pass without gradient
@pytest.mark.parametrize("k", [1, K])
def test_reentrant_checkpointing_is_refused_before_anything_is_updated(k: int) -> None:
    target = Stack(checkpointed=True, reentrant=True)
    before = copy.deepcopy(target.state_dict())
    guidance = Guidance(target, make_guide(), num_micro_batches=k)
    message = r"'blocks\.0\.0' carries no gradient.*activation checkpointing.*use_reentrant=False"
    with pytest.raises(ValueError, match=message):
        one_step(guidance, target, target, inputs().requires_grad_(), k=k)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    assert all(p.grad is None for p in target.parameters())


def test_blocks_that_are_checkpointed_from_within_can_be_guided_either_way() -> None:
    """A hook on a module whose own forward checkpoints sees its output outside the checkpoint, with a graph."""

    class Inner(nn.Module):
        def __init__(self, reentrant: bool | None) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.reentrant = nn.Linear(6, 10), nn.Linear(10, 8), reentrant

        def forward(self, x: Tensor) -> Tensor:
            def body(value: Tensor) -> Tensor:
                return self.second(self.first(value).tanh())

            return body(x) if self.reentrant is None else checkpoint(body, x, use_reentrant=self.reentrant)

    results = []
    for reentrant in (None, False, True):
        target = nn.Sequential(Inner(reentrant), nn.Linear(8, 4)).double()
        guidance = Guidance(target, make_guide(), target_layers=["0"], num_micro_batches=K)
        results.append(one_step(guidance, target, target, inputs().requires_grad_(), k=K))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def gpt2(reentrant: bool | None) -> nn.Module:
    """Returns a GPT-2 with dropout, under transformers' own checkpointing unless `reentrant` is None."""
    torch.manual_seed(0)
    network = transformer.build(
        vocab_size=11, max_length=7, layers=3, width=8, heads=2, feedforward=16, dropout=0.1
    ).double()
    if reentrant is not None:
        enable = getattr(network.gpt2, "activation_checkpointing_enable", None)
        enable = enable or network.gpt2.gradient_checkpointing_enable  # its name before transformers 5.23
        enable({"use_reentrant": reentrant})
    return network


def tokens() -> Tensor:
    return torch.randint(11, (N, 7), generator=torch.Generator().manual_seed(2))


def embedded_guide() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 9), nn.Linear(9, 5), nn.Linear(5, 3)).double()


@pytest.mark.parametrize("layers", ["weights", "blocks"])
def test_checkpointing_of_transformers_changes_nothing(layers: str) -> None:
    results = []
    for reentrant in (None, False):
        target = gpt2(reentrant)
        guidance = Guidance(target, embedded_guide(), target_layers=layers, num_micro_batches=K)
        results.append(one_step(guidance, target, target, tokens(), k=K))
    assert_same(results[1], results[0])


def test_reentrant_checkpointing_of_transformers_is_refused() -> None:
    target = gpt2(True)
    guidance = Guidance(target, embedded_guide(), target_layers=["gpt2.transformer.h.*.mlp.c_fc"])
    with pytest.raises(ValueError, match=r"c_fc' carries no gradient.*use_reentrant=False"):
        one_step(guidance, target, target, tokens())


# torch.compile

BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture
def _fresh_compiler() -> Any:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, K])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_target(backend: str, k: int, in_place: bool) -> None:
    """module.compile() and torch.compile(module), in one graph: the same values and gradients, step after step."""
    plain = Stack()
    expected = one_step(Guidance(plain, make_guide(), num_micro_batches=k), plain, plain, inputs(), k=k)
    target = Stack()
    guidance = Guidance(target, make_guide(), num_micro_batches=k)
    # inductor draws other random numbers than eager torch unless told.
    options: dict[str, Any] = {"options": {"fallback_random": True}} if backend == "inductor" else {}
    run: Callable[[Tensor], Tensor] = target
    if in_place:
        target.compile(backend=backend, fullgraph=True, **options)
    else:
        run = torch.compile(target, backend=backend, fullgraph=True, **options)
    for _ in range(3):
        assert_same(one_step(guidance, run, target, inputs(), k=k), expected, rtol=1e-10)
    assert run(inputs()).shape == (N, 4), "and outside of record()"
    assert counters["stats"]["unique_graphs"], "it was compiled"


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.usefixtures("_fresh_compiler")
def test_hooks_that_come_after_the_first_compiled_run_are_an_error(in_place: bool) -> None:
    """They never fire; the message names the order that works."""
    target = Stack()
    run: Callable[[Tensor], Tensor] = target
    if in_place:
        target.compile(backend="eager")
    else:
        run = torch.compile(target, backend="eager")
    run(inputs())
    guidance = Guidance(target, make_guide())
    with pytest.raises(ValueError, match=r"did not run.*compiled.*prepare, Guidance, compile"):
        one_step(guidance, run, target, inputs())


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_target_that_overwrites_its_layers() -> None:
    """In-place ReLUs: the first pass finds out on its own whose output they overwrite, compiled or not."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)
        ).double()

    plain = build()
    expected = one_step(Guidance(plain, make_guide()), plain, plain, inputs())
    target = build()
    guidance = Guidance(target, make_guide())
    target.compile(backend="aot_eager", fullgraph=True)
    for _ in range(3):
        assert_same(one_step(guidance, target, target, inputs()), expected, rtol=1e-10)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_and_checkpointed() -> None:
    """Either the same numbers or an error, never a silent loss of gradient."""
    plain = Stack()
    expected = one_step(Guidance(plain, make_guide()), plain, plain, inputs())
    target = Stack(checkpointed=True)
    guidance = Guidance(target, make_guide())
    target.compile(backend="aot_eager")
    assert_same(one_step(guidance, target, target, inputs()), expected, rtol=1e-10)


# Weight tying


class Tied(nn.Module):
    """One linear layer that runs `times` times, and another that shares its weight."""

    def __init__(self, times: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.twin, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.twin.weight, self.times = self.inner.weight, times
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.inner(x).tanh()
        return self.head(self.twin(x).tanh())


@pytest.mark.parametrize("pairs", [[("inner", 0), ("inner#2", 1), ("twin", 1)], [("inner#2", 1)]])
def test_tied_modules_and_tied_parameters_equal_autograd(pairs: list[tuple[str, int]]) -> None:
    target, guide = Tied(2), make_guide()
    guidance = Guidance(target, guide, pairs=[[ours, str(2 * theirs)] for ours, theirs in pairs])
    for _ in range(2):
        _, found = one_step(guidance, target, target, inputs())
    literal = Tied(2)
    x = inputs()
    first = literal.inner(x)
    second = literal.inner(first.tanh())
    third = literal.twin(second.tanh())
    ours = {"inner": first, "inner#2": second, "twin": third}
    theirs = [guide[0](x).detach(), guide[:3](x).detach()]
    loss = torch.stack([1 - cka(ours[layer], theirs[i]) for layer, i in pairs]).sum()
    (loss + literal.head(third.tanh()).square().sum() / 1000).backward()
    for name, parameter in literal.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("layers", [["inner"], ["inner#1", "inner"]])
def test_a_layer_that_runs_more_or_less_often_than_before(first: int, then: int, layers: list[str]) -> None:
    """Fewer fires than before lack one; more would be left out in silence. Both are errors that say so."""
    target = Tied(first)
    guidance = Guidance(target, make_guide(), target_layers=["inner", "twin"])
    one_step(guidance, target, target, inputs())
    target.times = then
    with pytest.raises(
        ValueError, match=rf"layer 'inner' ran {then} times? in this forward pass, but {first} times? bef"
    ):
        one_step(guidance, target, target, inputs())
    target.times = first
    one_step(guidance, target, target, inputs())


# Outputs of any kind

Named = namedtuple("Named", ["nothing", "state", "other"])


@dataclass
class Custom:
    """An output that is neither a tuple nor a dict."""

    note: str
    state: Tensor


SHAPES: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda x: (x, x.sum()),
    "none first": lambda x: (None, x),
    "named tuple": lambda x: Named(None, x, 3),
    "list": lambda x: [x, x + 1],
    "dict": lambda x: {"cache": None, "state": x},
    "nested": lambda x: ({"deep": [None, (x,)]}, x.sum()),
    "model output": lambda x: CausalLMOutput(logits=x),
    "dataclass": lambda x: Custom("as it is", x),
}


class Wrapping(nn.Module):
    """A linear layer whose output comes in a shape of SHAPES."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.kind = nn.Linear(6, 8), kind

    def forward(self, x: Tensor) -> Any:
        return SHAPES[self.kind](self.linear(x))


class Unwrapping(nn.Module):
    """Guidance on `wrapping`, whose output the head takes apart."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.wrapping, self.head = Wrapping(kind), nn.Linear(8, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.wrapping(x)
        return self.head(self.wrapping.linear(x).tanh())


@pytest.mark.parametrize("kind", SHAPES)
def test_outputs_of_every_kind(kind: str) -> None:
    target = Unwrapping(kind)
    recorder = Recorder(target, ["wrapping"])
    with recorder.record():
        target(inputs())
    found = recorder.take(needs_graph=True)["wrapping"].output
    assert torch.equal(found, target.wrapping.linear(inputs()))
    assert found.requires_grad


@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: (None, p), lambda p: {"packed": p, "length": 3}])
def test_packed_sequences_wherever_they_are(wrap: Callable[[Any], Any]) -> None:
    """They come back padded, batch first."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.RNN(3, 5)

        def forward(self, x: Any) -> Any:
            return wrap(self.rnn(x)[0])

    target = nn.Sequential(Packed())
    long, short = torch.randn(4, 3), torch.randn(2, 3)
    recorder = Recorder(target, ["0"])
    with recorder.record():
        target(pack_sequence([long, short]))
    found = recorder.take()["0"].output
    assert found.shape == (2, 4, 5)
    torch.testing.assert_close(found[1, :2], target[0].rnn(short)[0])
    assert not found[1, 2:].any()


def test_a_layer_without_a_tensor_says_what_it_returns() -> None:
    class Useless(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return "no tensor at all"

    target = nn.Sequential(Useless(6, 6))
    recorder = Recorder(target, ["0"])
    with recorder.record():
        target(inputs())
    with pytest.raises(ValueError, match="layer '0' returned a str, in which there is no tensor"):
        recorder.take()


@pytest.mark.parametrize("kind", ["tuple", "dict", "model output", "plain"])
def test_logits_are_known_in_whatever_they_come(kind: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Any:
            hidden = self.body(x)
            logits = self.head(hidden)
            if kind == "model output":
                return CausalLMOutput(logits=logits, hidden_states=(hidden,))
            return {"tuple": (logits, hidden), "dict": {"logits": logits, "hidden": hidden}, "plain": logits}[kind]

    assert [layer.name for layer in trace_layers(Model(), torch.ones(2, 6), "weights")] == ["body"]


def test_logits_are_known_though_the_engine_wraps_what_modules_return() -> None:
    """ZeRO-3's hooks, which come first, hand on new tensors of the same memory."""

    class Wrap(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    target = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    for module in target.modules():
        module.register_forward_hook(lambda _, __, output: Wrap.apply(output))
    guidance = Guidance(target, make_guide(), guide_layers=["0"])
    one_step(guidance, target, target, inputs())
    assert [str(pair) for pair in guidance.pairs] == ["0 <- 0"]
    traced = trace_layers(target, inputs(), "weights")
    assert [layer.name for layer in traced] == ["0"]


# Targets as they come


def wrapped_gradients(group: Any) -> list[Any]:
    """Gradients when the guidance is given the DDP-wrapped target, and when it is given the bare one."""
    results = []
    for wrapped in (True, False):
        bare = Stack(dropout=0.0)
        target = DistributedDataParallel(bare, process_group=group)
        guidance = Guidance(target if wrapped else bare, make_guide(), group=group)
        x = inputs().tensor_split(group.size())[group.rank()]
        results.append(one_step(guidance, target, bare, x))
    return results


def test_a_wrapped_target_is_as_good_as_a_bare_one(pool: Pool) -> None:
    for wrapped, bare in pool.run(wrapped_gradients, 2):
        assert_same(wrapped, bare)


def test_frozen_lower_layers() -> None:
    """A trainable layer above frozen ones is guided as ever; a frozen one is refused by name."""
    target = Stack()
    expected = one_step(Guidance(target, make_guide(), target_layers=["blocks.2.0"]), target, target, inputs())
    target = Stack()
    target.blocks[:2].requires_grad_(False)
    guidance = Guidance(target, make_guide(), target_layers=["blocks.2.0"])
    found = one_step(guidance, target, target, inputs())
    assert found[1].keys() == {name for name in expected[1] if name.startswith(("blocks.2", "head"))}
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, expected[1][name])
    guidance = Guidance(target, make_guide(), target_layers=["blocks.1.3", "blocks.2.0"])
    with pytest.raises(ValueError, match=r"'blocks\.1\.3' carries no gradient.*frozen.*choose a later layer"):
        one_step(guidance, target, target, inputs())


def test_a_target_in_evaluation_mode() -> None:
    target = Stack(dropout=0.5).eval()
    without = Stack(dropout=0.0)
    expected = one_step(Guidance(without, make_guide()), without, without, inputs())
    assert_same(one_step(Guidance(target, make_guide()), target, target, inputs()), expected)


def test_a_guide_of_torchs_own_transformer_layers_fires_in_evaluation_mode() -> None:
    """Their fast path would run past every hook."""
    torch.manual_seed(0)
    guide = nn.Sequential(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), 2), nn.Linear(6, 3)
    )
    names = candidates(guide, "weights")
    assert not any(name.endswith("out_proj") for name in names), "which attention never calls"
    recorder = Recorder(guide.eval(), names)
    with torch.no_grad(), recorder.record():
        guide(torch.randn(2, 5, 6))
    assert sorted(recorder.take()) == sorted(names)


# Exceptions and copies


def test_an_exception_inside_record_disarms_the_hooks() -> None:
    target = Stack()
    guidance = Guidance(target, make_guide())
    expected = one_step(guidance, target, target, inputs())

    def fails(x: Tensor) -> Tensor:
        target.blocks[0](x)
        return target(x[:, :5])

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        one_step(guidance, fails, target, inputs())
    target(inputs())
    assert_same(one_step(guidance, target, target, inputs()), expected)
    with pytest.raises(ValueError, match=r"'blocks\.0\.0' was chosen but did not run"):
        one_step(guidance, lambda x: x, target, inputs())
    with guidance.record(), pytest.raises(ValueError, match="entered inside itself"), guidance.record():
        pass
    assert_same(one_step(guidance, target, target, inputs()), expected)


def test_two_guidances_on_one_target() -> None:
    """Their gradients add up, and neither sees what the other records."""
    singles = []
    for layers in (["blocks.0.0"], ["blocks.2.0", "blocks.1.3"]):
        target = Stack()
        singles.append(one_step(Guidance(target, make_guide(), target_layers=layers), target, target, inputs()))
    target = Stack()
    first = Guidance(target, make_guide(), target_layers=["blocks.0.0"])
    second = Guidance(target, make_guide(), target_layers=["blocks.2.0", "blocks.1.3"])
    torch.manual_seed(100)
    with first.record(), second.record():
        first.run_guide(inputs())
        second.run_guide(inputs())
        output = target(inputs())
    (first.loss() + second.loss() + 2 * output.square().sum() / 1000).backward()
    for name, parameter in target.named_parameters():
        torch.testing.assert_close(parameter.grad, singles[0][1][name] + singles[1][1][name])
    first.close()
    assert_same(one_step(second, target, target, inputs()), singles[1])


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_hooked_target_have_no_hooks(how: str) -> None:
    """An averaged copy (EMA) that runs beside the target must not be recorded in its place."""
    target = Stack()
    guidance = Guidance(target, make_guide())
    expected = one_step(guidance, target, target, inputs())
    if how == "deepcopy":
        twin = copy.deepcopy(target)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(target))
    else:
        file = io.BytesIO()
        torch.save(target, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)

    def both(x: Tensor) -> Tensor:
        state = torch.get_rng_state()
        with torch.no_grad():
            twin(x + 1)
        torch.set_rng_state(state)
        return target(x)

    assert_same(one_step(guidance, both, target, inputs()), expected)
    again = Guidance(twin, make_guide())
    assert_same(one_step(again, twin, twin, inputs()), expected)
