"""A pool of real gloo processes, spawned once a session: a distributed check then costs milliseconds, not seconds."""

from __future__ import annotations

import atexit
import importlib
import os
import pickle
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

# DeepSpeed compiles a small extension at its first start; in a cache shared by two virtual environments they would
# take turns in compiling it anew.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
# Tokenised text and tables of the tests' own data: nothing that a later session would find again.
if "HF_DATASETS_CACHE" not in os.environ:
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
MAX_PROCESSES = 4
TIMEOUT_S = 120


def _work(rank: int, rendezvous: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=MAX_PROCESSES, timeout=limit)
    groups = {size: dist.new_group(list(range(size))) for size in range(1, MAX_PROCESSES + 1)}
    while (message := pickle.loads(pipe.recv_bytes())) is not None:
        module, name, size, kwargs = message
        try:
            check = getattr(importlib.import_module(module), name)
            pipe.send_bytes(pickle.dumps((True, check(groups[size], **kwargs))))
        except BaseException as error:  # noqa: BLE001 - whatever a check raises belongs to the test that asked for it
            pipe.send_bytes(pickle.dumps((False, (type(error).__name__, str(error), traceback.format_exc()))))
    dist.destroy_process_group()


class CheckFailedError(Exception):
    """A check raised on one or more ranks; `errors` holds (type name, message) by rank, None where it did not."""

    def __init__(self, errors: list[tuple[str, str] | None], text: str) -> None:
        super().__init__(text)
        self.errors = errors


class Pool:
    """Runs functions of test modules on the first `world_size` ranks of real gloo processes."""

    def __init__(self, rendezvous: str) -> None:
        context = get_context("spawn")
        self._pipes = []
        self._processes = []
        for rank in range(MAX_PROCESSES):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, rendezvous, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, check: Any, world_size: int, **kwargs: Any) -> list[Any]:
        """Returns what `check(group, **kwargs)` returned on each rank; raises CheckFailedError if any raised."""
        message = pickle.dumps((check.__module__, check.__name__, world_size, kwargs))
        for pipe in self._pipes[:world_size]:
            pipe.send_bytes(message)
        results = []
        for rank, pipe in enumerate(self._pipes[:world_size]):
            if not pipe.poll(TIMEOUT_S + 30):
                pytest.exit(f"rank {rank} hangs in {check.__name__}", returncode=1)
            results.append(pickle.loads(pipe.recv_bytes()))
        failed = [None if ok else value for ok, value in results]
        if any(failed):
            text = "\n".join(f"rank {rank}: {value[2]}" for rank, value in enumerate(failed) if value)
            raise CheckFailedError([value and value[:2] for value in failed], text)
        return [value for _, value in results]

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps(None))
        for process in self._processes:
            process.join(timeout=10)


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """The session's gloo processes."""
    rendezvous: Path = tmp_path_factory.mktemp("rendezvous") / "file"
    made = Pool(rendezvous.as_uri())
    yield made
    made.close()
