"""The benchmarks compare like with like: every way gives the same numbers, and the verdicts see what fails."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_memory
import bench_similarity
import memory_methods
import pytest
import similarity_report
import torch
import torch.distributed as dist
from memory_methods import Setting
from reference import cka, related_rows
from similarity_methods import AUTO, Cost, Method, Size, methods

ROOT = Path(__file__).parent.parent
TINY = Setting("tiny", rows=8, width=6, hidden=12, depth=2, guided=2, covariance=True)


def ways_beside_the_reference(group: Any) -> dict[str, tuple[float, float]]:
    """Method -> how far its value and its gradient are from the literal ones, relative, on the first default group."""
    w, rank = dist.get_world_size(), dist.get_rank()
    x, y = (rows.float() for rows in related_rows(8 * w, 12, 10))
    whole = x.double().requires_grad_()
    truth = {}
    for estimator in ("biased", "debiased"):
        value = cka(whole, y, estimator)
        (gradient,) = torch.autograd.grad(value, whole)
        truth[estimator] = (value.detach(), gradient.chunk(w)[rank])
    found = {}
    for method in methods().values():
        if not method.installed:
            continue
        _, value, gradient = bench_similarity.run_once(method, x.chunk(w)[rank], y.chunk(w)[rank])
        true_value, true_gradient = truth[method.estimator]
        # What every rank holds is averaged over ranks by the engine: so it is W times its share.
        share = {"exact": w, "1/W": 1, "value only": 0}[method.gradient]
        got = torch.zeros_like(true_gradient) if gradient is None else gradient
        off = (got - share * true_gradient).norm() / (w * true_gradient.norm())
        found[method.name] = (float((value - true_value).abs() / true_value), float(off))
    return found


def test_every_way_gives_the_reference(pool: Any) -> None:
    for found in pool.run(ways_beside_the_reference, 4):
        assert {"gather + autograd, Gram", "own slice put back, H K H", AUTO} <= set(found)
        assert {name: off for name, off in found.items() if max(off) > 1e-5} == {}


def memory_ways(group: Any, k: int) -> dict[str, tuple[float, list[torch.Tensor]]]:
    """Method -> guidance loss and the target's gradients, of one step over k micro-batches."""
    found = {}
    for name in memory_methods.METHODS:
        step = memory_methods.make_step(name, TINY, k, "cpu")
        loss = step(k, TINY.rows)
        found[name] = (float(loss), [p.grad for p in step.target.parameters() if p.grad is not None])
    return found


@pytest.mark.parametrize("k", [1, 3])
def test_every_way_of_accumulating_leaves_the_same_gradient(pool: Any, k: int) -> None:
    for found in pool.run(memory_ways, 4, k=k):
        loss, gradients = found["all graphs kept"]
        assert len(gradients) == 4 * TINY.depth
        for other_loss, others in found.values():
            assert other_loss == pytest.approx(loss, rel=1e-5)
            for gradient, other in zip(gradients, others, strict=True):
                torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


def test_predicted_memory_grows_as_it_must() -> None:
    tokens, wide = memory_methods.SETTINGS["tokens"], memory_methods.SETTINGS["wide"]
    assert memory_methods.predict("covariance", tokens, 64, 2).rows == 0
    one, many = (memory_methods.predict("transpose", wide, k, 2) for k in (1, 64))
    assert (many.rows, many.matrices) == (64 * one.rows, 64**2 * one.matrices)
    assert one.rows == 2 * 16 * 16384 * 4
    assert one.matrices == 2 * 32**2 * 4


def point(w: int = 2, **seconds: list[float]) -> dict[str, Any]:
    """A judged point of bench_similarity; methods are named by their last word."""
    names = {name.split()[-1]: name for name in methods()} | {"auto": AUTO, "peer": "pytorch-cka cka_from_features"}
    names["debiased"] = f"{AUTO}, debiased"
    rest = {"value_off": 0.0, "gradient_off": 0.0, "memory": 1, "bytes": 1, "gradient": 1.0}
    figures = {names[name]: {"seconds": times, **rest} for name, times in seconds.items()}
    found = {"size": [64, 8, 8, w], "auto": "gather", "methods": figures, "skipped": {}}
    similarity_report.judge(found)
    return found


def test_verdict_on_times(capsys: pytest.CaptureFixture[str]) -> None:
    slow, noisy, quick = [2.0, 2.1, 2.2], [0.9, 1.3, 2.9], [1.0, 1.1, 1.2]
    assert point(auto=quick, transpose=slow)["failures"] == []
    assert point(auto=noisy, transpose=quick)["failures"] == [], "within the spread"
    assert point(auto=slow[:2], transpose=quick[:2])["failures"] == [], "two turns show nothing"
    assert point(auto=slow, gather=quick)["failures"] == [], "the layout that auto took"
    assert point(1, auto=slow, transpose=quick)["failures"] == [], "the same code in one process"
    failing = point(auto=slow, transpose=quick)
    assert len(failing["failures"]) == 1
    assert len(point(auto=slow, debiased=slow, peer=quick)["failures"]) == 1
    assert similarity_report.show_verdict([failing]) == 1
    assert "scale_guide transpose is faster: 0.52 times" in capsys.readouterr().out


def test_verdict_on_agreement() -> None:
    for field in ("value_off", "gradient_off"):
        for wrong in (0.5, float("nan")):
            found = point(auto=[1.0], gather=[1.0])
            found["methods"]["scale_guide gather"][field] = wrong
            similarity_report.judge(found)
            assert len(found["failures"]) == 1


def test_a_table_says_why_a_point_was_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    found = point(auto=[1.0, 2.0, 3.0])
    found["skipped"] = {"scale_guide gather": "needs 34 GB"}
    similarity_report.show_table([found])
    assert "| 2 | 64 | 8, 8 | gather | 2 | needs 34 GB | - | - | - | - | ok |" in capsys.readouterr().out


def test_what_is_too_large_or_too_slow_is_left_out() -> None:
    def method(name: str, held: float) -> Method:
        return Method(name, lambda x, y: x.sum(), lambda size: Cost(0, 0, 0, held))

    reasons = bench_similarity.too_large(Size(64, 8, 8, 2), [method("huge", 4e9), method("tiny", 1.0)], 20)
    assert list(reasons) == ["huge"]
    assert bench_similarity.too_slow({AUTO: 30.0, "slow": 25.0, "fast": 1.0}, 100) == {"slow": "needs 25.0 s a turn"}
    # A method is nothing without what it is compared with.
    skipped = {AUTO: "needs 34 GB"}
    assert bench_similarity._without([method("alone", 1.0)], skipped) == []
    assert skipped["alone"] == f"{AUTO} needs 34 GB"


def memory_entries(peaks: dict[str, list[int]], **fields: Any) -> list[dict[str, Any]]:
    common = {"setting": "tokens", "w": 1, "rows": 0, "wire": 0, "matrices": 0, "loss": 0.5, "gradient": 1.0} | fields
    return [
        {"method": m, "k": 2**i, "peak": peak, **common} for m, line in peaks.items() for i, peak in enumerate(line)
    ]


def test_verdict_on_memory() -> None:
    mb = 10**6
    assert bench_memory.judge(memory_entries({"covariance": [100 * mb, 103 * mb]})) == []
    assert len(bench_memory.judge(memory_entries({"covariance": [100 * mb, 107 * mb]}))) == 1
    assert bench_memory.judge(memory_entries({"transpose": [100 * mb, 150 * mb]}, rows=60 * mb)) == []
    assert len(bench_memory.judge(memory_entries({"transpose": [100 * mb, 150 * mb]}, rows=20 * mb))) == 1
    entries = memory_entries({"covariance": [mb], "gather": [mb]})
    entries[1]["gradient"] = float("nan")
    assert len(bench_memory.judge(entries)) == 1


def run_script(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / name), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=environment, cwd=ROOT.parent, capture_output=True, text=True, timeout=240, check=False
    )


def test_similarity_script_runs(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    options = ["--processes=2", "--repeats=3", "--methods=gather,hsic", "--table", f"--json={figures}"]
    done = run_script("bench_similarity.py", "--sizes", "32,6,8", *options)
    # Whether the verdict on times holds at such a size is no matter of right and wrong.
    assert done.returncode in (0, 1), done.stderr
    (found,) = json.loads(figures.read_text())["points"]
    expected = {AUTO, "scale_guide gather", "gather + autograd, Gram", "gather + autograd, covariance"}
    assert expected <= set(found["methods"])
    assert all(len(figure["seconds"]) >= 3 for figure in found["methods"].values())
    assert all("is faster" in failure for failure in found["failures"])
    assert "| 2 | 32 | 6, 8 |" in done.stdout
    if "ckatorch cka_base (hsic)" not in found["methods"]:
        assert "left out: ckatorch is not installed" in done.stdout


@pytest.mark.slow
def test_map_script_runs() -> None:
    done = run_script("bench_map.py", "--images=32", "--image_size=32", "--batch_size=16", "--repeats=1")
    # Whether ours is quicker at such a size is no matter of right and wrong.
    assert done.returncode in (0, 1), done.stderr
    name, seconds, ratio, error = done.stdout.splitlines()[4].strip("| ").split(" | ")
    assert (name, ratio) == ("scale_guide", "1.00")
    assert float(seconds) > 0
    assert float(error) < 1e-4


@pytest.mark.slow
def test_memory_script_runs(tmp_path: Path) -> None:
    figures, picture = tmp_path / "figures.json", tmp_path / "figure.png"
    options = ["--settings=tokens", "--processes=1", "--micro_batches=1,4", f"--json={figures}", f"--figure={picture}"]
    done = run_script("bench_memory.py", "--methods=covariance,all graphs kept", "--table", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    peaks = {(e["method"], e["k"]): e["peak"] for e in json.loads(figures.read_text())["entries"]}
    assert peaks["all graphs kept", 4] > 2 * peaks["covariance", 4]
    assert picture.stat().st_size > 0
    assert "| tokens, W=1: peak MB | k=1 | k=4 |" in done.stdout


def test_options_are_checked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_similarity.py", "--sizes", "10,8,8", "--processes", "4"])
    with pytest.raises(SystemExit):
        bench_similarity.read_options()
    assert "multiple of the number of processes, 4" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["bench_similarity.py", "--grid"])
    options: argparse.Namespace = bench_similarity.read_options()
    assert [len(sizes) for sizes in options.points] == [25, 25, 25]
