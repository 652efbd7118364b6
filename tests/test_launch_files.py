"""accelerate_configs/ and ds_configs/: what stands in them, and that each starts two processes on this machine."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from launching import ROOT, finish, start

LAUNCH_FILES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
DEEPSPEED_FILES = sorted((ROOT / "ds_configs").glob("*.json"))
# Accelerate refuses these beside deepspeed_config_file, wherever in the YAML they stand.
CONFLICTING = {
    "mixed_precision",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_stage",
    "offload_optimizer_device",
    "offload_param_device",
    "zero3_save_16bit_model",
}
SIZES = {
    0: ("reduce_bucket_size", "allgather_bucket_size"),
    1: ("reduce_bucket_size", "allgather_bucket_size"),
    2: ("reduce_bucket_size", "allgather_bucket_size"),
    3: (
        "reduce_bucket_size",
        "sub_group_size",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
    ),
}
# What the trainer does with the engine, at its smallest. It leaves right after a burst of collectives: a gloo thread
# that still holds one of their tensors while Python shuts down aborts the process.
PROGRAM = """
import torch
from scale_guide.engine import Engine

engine = Engine(timeout_s=60)
torch.manual_seed(0)
layers = torch.nn.Linear(16, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU(), torch.nn.Linear(64, 4)
target = torch.nn.Sequential(*layers)
model = engine.prepare(target, torch.optim.Adam(target.parameters(), lr=1e-2), micro_batch_size=8, clip_norm=0.0)
generator = torch.Generator().manual_seed(engine.rank)
x = torch.randn(8, 16, generator=generator).to(engine.device)
losses = []
for _ in range(5):
    with engine.micro_batch(last=True):
        loss = torch.nn.functional.cross_entropy(engine.forward(model, x).float(), x[:, :4].argmax(1))
        engine.backward(loss)
    engine.step()
    losses.append(float(engine.sum(loss)) / engine.world_size)
dtype = str(next(model.parameters()).dtype)
if engine.is_main:
    print("RESULT", engine.name, engine.world_size, engine.device.type, dtype, losses[0], losses[-1], flush=True)
del model, target, layers
for _ in range(30):
    engine.sum(torch.ones(3))
engine.close()
"""


def launch(tmp_path: Path, file: str, *options: str) -> subprocess.Popen[str]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    return start(file, *options, str(program))


def result(*processes: subprocess.Popen[str]) -> list[str]:
    """Returns the words of the main rank's RESULT line."""
    everything = finish(*processes)
    lines = [line.split()[1:] for line in everything.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == 1, everything
    return lines[0]


def test_every_file_of_the_contract_is_there() -> None:
    names = {path.stem for path in LAUNCH_FILES}
    assert {"cpu", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "multinode_zero3"} <= names
    assert {"zero0", "zero1", "zero2", "zero3", "zero3_offload"} <= {path.stem for path in DEEPSPEED_FILES}


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.stem)
def test_launch_file_is_one_accelerate_reads(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.distributed_type.value in ("MULTI_GPU", "DEEPSPEED")
    assert config.num_processes >= 2
    assert path.read_text().startswith("#"), "the first line says what the file is for"


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.stem)
def test_launch_file_holds_nothing_that_belongs_in_the_deepspeed_file(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    deepspeed = config.get("deepspeed_config", {})
    assert ("deepspeed_config" in config) == (config["distributed_type"] == "DEEPSPEED")
    assert not CONFLICTING & (config.keys() | deepspeed.keys())
    if deepspeed:
        file = ROOT / deepspeed["deepspeed_config_file"]
        assert file in DEEPSPEED_FILES
        assert file.stem in path.stem


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.stem)
def test_only_several_machines_need_a_fixed_port(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    if config["num_machines"] == 1:
        assert config["main_process_port"] == 0, "0: a free port, so that two runs fit on one machine"
    else:
        assert config["main_process_port"] > 0
        assert not {"machine_rank", "main_process_ip"} & config.keys(), "a default would make every machine the first"


@pytest.mark.parametrize("path", DEEPSPEED_FILES, ids=lambda path: path.stem)
def test_deepspeed_file_leaves_nothing_to_a_default(path: Path) -> None:
    config: dict[str, Any] = json.loads(path.read_text())
    zero = config["zero_optimization"]
    assert path.stem.startswith(f"zero{zero['stage']}")
    # Unwritten, DeepSpeed clips at 1.0; 0.0 leaves it to the recipe.
    assert config["gradient_clipping"] == 0.0
    assert config["gradient_accumulation_steps"] == 1
    assert config["train_micro_batch_size_per_gpu"] == "auto"
    # `false` would make `accelerate launch --mixed_precision bf16` train in fp32 without a word.
    assert config["bf16"]["enabled"] == "auto"
    assert config["zero_allow_untested_optimizer"] is True
    assert config["zero_force_ds_cpu_optimizer"] is False
    # "auto" sizes need model.config.hidden_size, which most targets have not.
    assert all(type(zero[size]) is int and zero[size] > 0 for size in SIZES[zero["stage"]])
    assert "auto" not in zero.values()
    if zero["stage"] == 3:
        assert zero["stage3_gather_16bit_weights_on_model_save"] is True
    offloads = {key: zero[key]["device"] for key in zero if key.startswith("offload_")}
    assert offloads == ({"offload_optimizer": "cpu", "offload_param": "cpu"} if "offload" in path.stem else {})


@pytest.mark.parametrize(
    ("file", "engine"),
    [
        ("cpu", "DDP"),
        ("ddp", "DDP"),
        ("zero1", "ZeRO-1"),
        ("zero2", "ZeRO-2"),
        ("zero3", "ZeRO-3"),
        ("zero3_offload", "ZeRO-3"),
    ],
)
def test_launch_file_trains_on_two_cpu_processes(tmp_path: Path, file: str, engine: str) -> None:
    name, world_size, device, dtype, first, last = result(launch(tmp_path, file))
    assert (name, world_size, device, dtype) == (engine, "2", "cpu", "torch.float32")
    assert float(last) < float(first)


def test_multinode_file_joins_two_machines(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    machines = [launch(tmp_path, "multinode_zero3", *here, "--machine_rank", str(rank)) for rank in (0, 1)]
    name, world_size, *_ = result(*machines)
    assert (name, world_size) == ("ZeRO-3", "2")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["zero1", "zero2", "zero3"])
def test_precision_of_the_command_line_reaches_deepspeed(tmp_path: Path, file: str) -> None:
    _, _, _, dtype, first, last = result(launch(tmp_path, file, "--mixed_precision", "bf16"))
    assert dtype == "torch.bfloat16"
    assert float(last) < float(first)


@pytest.mark.slow
def test_one_process_is_enough(tmp_path: Path) -> None:
    name, world_size, *_ = result(launch(tmp_path, "cpu", "--num_processes", "1"))
    assert (name, world_size) == ("DDP", "1")
