"""Checkpoints: whole or not there, refused when they belong to another run, safe from a full disk and a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scale_guide.__main__ import main
from scale_guide.checkpoint import Checkpoints
from scale_guide.engine import Engine
from scale_guide.manifest import read_manifest, whole_checkpoints

ROOT = Path(__file__).parent.parent
PATHS = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"

TINY = """
task: {name: "toy:build"}
target: {name: deep_fcn, options: {depth: 2, first_width: 16, width: 16, dropout: 0.2}}
guide: {name: deep_fcn, options: {depth: 2, first_width: 16, width: 16, batch_norm: false}}
training: {batch_size: 32, steps: 6, num_workers: 0, log_every: 1, checkpoint_every: 2, keep_checkpoints: 2}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


def train(recipe: str, run_dir: Path, *options: str) -> int:
    """Trains in this process; returns the exit code."""
    return main(["train", "--config", recipe, "--run_dir", str(run_dir), *options])


def names(run_dir: Path) -> list[str]:
    """Returns everything in the checkpoint folder."""
    return sorted(p.name for p in (run_dir / "checkpoints").iterdir())


def test_keeps_the_last_and_resumes_exactly(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """keep_checkpoints holds; going on from the newest gives the uninterrupted weights bit for bit."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(tiny, whole) == 0
    assert names(whole) == ["step_00000004", "step_00000006"]
    assert train(tiny, cut, "--training.steps=4") == 0
    assert train(tiny, cut) == 0
    assert "resumed from step 4" in capsys.readouterr().out
    first, second = (load_file(run / "target/model.safetensors") for run in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)
    (cut / "checkpoints/step_00000006/model.safetensors").write_bytes(b"short")
    (cut / "checkpoints/step_00000008.partial").mkdir()
    assert [p.name for p in whole_checkpoints(cut)] == ["step_00000004"], "a damaged checkpoint does not count"
    assert train(tiny, cut) == 0, "and the one before it is taken"
    assert names(cut) == ["step_00000004", "step_00000006"], "leftovers are gone"
    third = load_file(cut / "target/model.safetensors")
    assert all(torch.equal(first[name], third[name]) for name in first)
    back = cut / "checkpoints/step_00000004"
    assert train(tiny, cut, f"--resume={back}", "--training.steps=5") == 0
    assert names(cut) == ["step_00000004", "step_00000005"], "what lay after the step gone back to is removed"


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--guidance.weight=0.5", "guidance.weight was 1.0 and is now 0.5"),
        ("--guide.seed=1", "guide.seed was 0 and is now 1; guide hash was"),
        ("--target.options.depth=3", "target.options.depth was 2 and is now 3"),
        ("--training.seed=5", "training.seed was 0 and is now 5"),
        ("--optimizer.schedule=cosine", "optimizer.schedule was 'constant' and is now 'cosine'"),
    ],
)
def test_another_configuration_is_refused(
    option: str, told: str, finished: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run_dir = finished
    assert train(recipe, run_dir, option) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "Give another --run_dir" in error
    assert "Traceback" not in error


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A recipe and the folder of a finished run of it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(TINY)
    assert train(str(folder / "tiny.yaml"), folder / "run") == 0
    return str(folder / "tiny.yaml"), folder / "run"


def test_another_guide_with_the_same_recipe_is_refused(
    finished: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe names the guide, but its weights may still be others: another library version, another file."""
    monkeypatch.setattr("scale_guide.guide.Guide.fingerprint", lambda self: "0" * 64)
    assert train(finished[0], finished[1]) == 2
    assert "guide hash was" in capsys.readouterr().err


def test_free_choices_and_finished_runs(finished: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    recipe, run_dir = finished
    assert train(recipe, run_dir, "--guidance.layout=gather", "--training.micro_batch_size=16") == 0
    assert "already finished" in capsys.readouterr().out
    assert train(recipe, run_dir, "--resume=never") == 2
    assert "already holds a run" in capsys.readouterr().err
    assert train(recipe, run_dir, f"--resume={run_dir}/checkpoints/step_7") == 2
    assert "is not a whole checkpoint" in capsys.readouterr().err


def test_another_engine_is_refused(
    finished: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run_dir = finished[0], tmp_path / "run"
    shutil.copytree(finished[1], run_dir)
    for folder in whole_checkpoints(run_dir):
        manifest = read_manifest(folder)
        manifest["identity"] |= {"engine": "ZeRO-3"}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    assert train(recipe, run_dir) == 2
    assert "engine was 'ZeRO-3' and is now 'DDP'" in capsys.readouterr().err


def flip(path: Path) -> None:
    """Changes one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_found(
    finished: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint before it is taken, and which and why is said; without another one nothing begins anew."""
    recipe, run_dir = finished[0], tmp_path / "run"
    shutil.copytree(finished[1], run_dir)
    flip(run_dir / "checkpoints/step_00000006/optimizer.bin")
    assert train(recipe, run_dir, "--resume", str(run_dir / "checkpoints/step_00000006")) == 2
    assert "it has optimizer.bin with another content (its checksum differs)" in capsys.readouterr().err
    assert train(recipe, run_dir) == 0
    printed = capsys.readouterr().out
    assert "step_00000006 is damaged: it has optimizer.bin with another content" in printed
    assert "going on from step_00000004." in printed
    assert "resumed from step 4" in printed
    for folder in whole_checkpoints(run_dir):
        flip(folder / "model.safetensors")
    assert train(recipe, run_dir) == 2
    error = capsys.readouterr().err
    assert "step_00000006 is damaged" in error
    assert "step_00000004 is damaged" in error
    assert "move the folder `checkpoints` away to start anew" in error


DAMAGED = [
    *("", "[]", "{}", "null", '{"format": 2}', "\0" * 40, "9" * 5000),
    '{"format": 2, "step": 4, "identity": {}, "files": {"a": 1}}',
    '{"format": 2, "step": 4, "identity": {}, "files": {"../../secret": [1, "0"]}}',
]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_manifest_is_no_crash(
    text: str, finished: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished[1], run_dir)
    (run_dir / "checkpoints/step_00000006/manifest.json").write_text(text)
    assert train(finished[0], run_dir) == 0
    assert "step_00000006 is damaged: it " in capsys.readouterr().out


def test_zero_and_other_processes_need_adam(finished: tuple[str, Path], tmp_path: Path) -> None:
    engine = Engine()
    checkpoints = Checkpoints(tmp_path, engine, keep=1, identity={"engine": "ZeRO-2", "optimizer.name": "sgd"})
    manifest = {"num_processes": 4, "identity": checkpoints.identity}
    told = checkpoints.mismatch(tmp_path / "step_00000004", manifest)
    assert "was made by 4 processes, and now there is 1" in told
    assert "optimizer.name='sgd'" in told
    assert not checkpoints.mismatch(tmp_path, manifest | {"num_processes": 1})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a failed test may hold a file open


def test_full_disk(tiny: str, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The disk fills up after a checkpoint: training goes on, that one loads; only the last save is an error."""
    run_dir = small_disk / "run"
    assert train(tiny, run_dir, "--training.steps=2") == 0
    before = names(run_dir)
    filler = small_disk / "filler"
    filler.write_bytes(b"0" * (shutil.disk_usage(small_disk).free - 24_000))
    with pytest.warns(UserWarning, match="could not be written .*the earlier ones stay"):
        assert train(tiny, run_dir) == 1
    assert "could not be saved" in capsys.readouterr().err
    assert names(run_dir) == before == ["step_00000002"]
    filler.unlink()
    assert train(tiny, run_dir) == 0
    assert "resumed from step 2" in capsys.readouterr().out


def test_other_errors_of_a_save_are_not_swallowed(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object, *args: object, **kwargs: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("accelerate.Accelerator.save_state", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        train(tiny, tmp_path / "run")


SLOW_SAVE = """
import sys, time
from scale_guide.__main__ import main
from scale_guide.engine import Engine
from scale_guide.manifest import read_manifest, whole_checkpoints
saved = Engine.save_state
def save_state(self, folder):
    problem = saved(self, folder)
    if "step_00000004" in folder.name:
        print("in the save", flush=True)
        time.sleep(60)
    return problem
Engine.save_state = save_state
sys.exit(main(sys.argv[1:]))
"""


def test_kill_during_a_save(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kill -9 when all files but the manifest are written: the next run goes on from the checkpoint before."""
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", SLOW_SAVE, "train", "--config", tiny, "--run_dir", str(run_dir)]
    env = os.environ | {"PYTHONPATH": PATHS}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("in the save" in line for line in process.stdout)
        process.send_signal(signal.SIGKILL)
    assert names(run_dir) == ["step_00000002", "step_00000004.partial"]
    assert train(tiny, run_dir) == 0
    assert "resumed from step 2" in capsys.readouterr().out
    assert names(run_dir) == ["step_00000004", "step_00000006"]


def test_sigterm_stops_a_single_process(tiny: str, tmp_path: Path) -> None:
    """Exit code 0, a checkpoint, and a line that says how to go on."""
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "scale_guide", "train", "--config", tiny, "--run_dir", str(run_dir)]
    command += ["--training.steps=100000", "--training.checkpoint_every=0", "--training.num_workers=2"]
    env = os.environ | {"PYTHONPATH": PATHS}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("step 3/" in line for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert time.monotonic() - began < 30
    assert "asked to stop: saved at step" in rest
    assert "The same command goes on from there" in rest
    assert len(whole_checkpoints(run_dir)) == 1


def test_a_worker_dies_of_its_parents_signals(tmp_path: Path) -> None:
    """Loader workers leave Ctrl-C to their parent: else the loader fails before the state is saved."""
    code = (
        "import os, signal\n"
        "from scale_guide.tracking import StopSignal, quiet_worker\n"
        "stop = StopSignal(); quiet_worker(0)\n"
        "os.kill(os.getpid(), signal.SIGINT); assert not stop.requested\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    env = os.environ | {"PYTHONPATH": PATHS}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGTERM, done.stderr


def test_removing_is_never_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill in the middle of removing an old checkpoint leaves nothing that looks like one."""
    run_dir = tmp_path / "run"
    engine = Engine()
    checkpoints = Checkpoints(run_dir, engine, keep=1, identity={})
    monkeypatch.setattr(engine, "save_state", lambda folder: (folder / "weights").write_text("1") and "")
    assert checkpoints.save(1)
    monkeypatch.setattr("scale_guide.checkpoint.shutil.rmtree", lambda *args, **kwargs: None)
    assert checkpoints.save(2)
    assert names(run_dir) == ["step_00000001.old.partial", "step_00000002"]
