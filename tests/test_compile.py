"""training.compile: the compiled target trains as the plain one does, hooks, phases, evaluation and all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import finish, start
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters

from scale_guide.__main__ import main
from scale_guide.launch import check_compile
from scale_guide.tracking import read_metrics

# Two passes over 4 micro-batches, dropout, BatchNorm, evaluations in between, and a guide that leaves.
TINY = """
task: {name: "toy:build"}
target: {name: deep_fcn, options: {depth: 3, first_width: 24, width: 24, dropout: 0.2}}
guide: {name: deep_fcn, options: {depth: 2, first_width: 24, width: 24, batch_norm: false}, seed: 1, dtype: fp32}
guidance: {warmup_steps: 1, stop_after: 3}
optimizer: {name: sgd, momentum: 0.9, lr: 0.05}
training: {batch_size: 64, micro_batch_size: 16, steps: 4, num_workers: 0, log_every: 1, evaluate_every: 1}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def check(compiled: Path, plain: Path, *, running: bool = True) -> None:
    """Checks losses, similarities, scores and saved weights of two runs; `running`: BatchNorm's too."""
    lines = [read_metrics(run) for run in (compiled, plain)]
    for a, b in zip(*lines, strict=True):
        for name in ("task_loss", "guidance_loss", "similarity"):
            assert a.get(name, 0.0) == pytest.approx(b.get(name, 0.0), rel=1e-4)
        if running:
            assert a.get("validation", {}) == pytest.approx(b.get("validation", {}), rel=1e-4)
    ours, theirs = (load_file(run / "target/model.safetensors") for run in (compiled, plain))
    assert ours.keys() == theirs.keys(), "nothing of the compiler in their names"
    for name in (name for name in ours if running or not name.endswith(("running_mean", "running_var", "tracked"))):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("default:The .grad attribute of a Tensor:UserWarning")  # torch looks, tracing a hook
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_run_is_the_plain_run(
    backend: str, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a checkpoint of one goes on as the other; a change of `compile` is no other configuration."""
    options = ["train", "--config", tiny, "--run_dir"]
    assert main([*options, str(tmp_path / "plain")]) == 0
    assert not counters["frames"]["ok"]
    compile_in_place = nn.Module.compile
    if backend == "eager":  # traced, with its guards and recompilations, but not turned into C++: seconds
        monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compile_in_place(self, backend="eager"))
    run = str(tmp_path / "compiled")
    assert main([*options, run, "--training.steps=2", "--training.compile=true"]) == 0
    assert main([*options, run, "--training.steps=3"]) == 0
    assert counters["frames"]["ok"]
    assert main([*options, run, "--training.compile=true"]) == 0
    check(tmp_path / "compiled", tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["cpu", "zero1", "zero2"])
def test_compiled_on_two_processes(launch: str, tiny: str, tmp_path: Path) -> None:
    """Against one plain process; each process keeps its own running statistics of BatchNorm."""
    options = ["train", "--config", tiny, "--run_dir"]
    finish(start(launch, "-m", "scale_guide", *options, str(tmp_path / "two"), "--training.compile=true"))
    assert main([*options, str(tmp_path / "plain")]) == 0
    check(tmp_path / "two", tmp_path / "plain", running=False)


def test_where_compiling_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu: Any = torch.device("cpu")
    with pytest.raises(ValueError, match=r"training\.compile=true does not go with ZeRO-3.*zero2\.yaml"):
        check_compile("ZeRO-3", cpu)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler on the CPU, and there is no 'no-such-compiler'"):
        check_compile("single", cpu)
    check_compile("single", torch.device("cuda"))
    monkeypatch.setenv("CXX", shutil.which("true") or "sh")
    check_compile("ZeRO-2", cpu)
