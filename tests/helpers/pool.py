"""Real gloo ranks for tests, forked for each job from one process that has imported everything.

`pool.run(job, *arguments)` calls `job(*arguments)` on every rank and returns the results, rank 0's first. Jobs are
module-level functions of test files; arguments and results must pickle. Importing costs 13 s a process, so it is done
once a session. A job's processes end with it: DeepSpeed's engines keep their process groups alive for ever, and each
gloo group has a thread that polls.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

IMPORTED_BEFORE = [
    "biroute.launcher.train.session",
    "biroute.launcher.start.worker",
    "biroute.parallel.engine.engine",
]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


class RankFailedError(Exception):
    """A job raised on some rank; carries that rank's traceback."""


class WorkerPool:
    """`world_size` ranks, joined in one gloo group for each job."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []

    def run(self, job: Callable[..., Any], *arguments: Any, timeout_seconds: float = 600.0) -> list[Any]:
        """Results of `job(*arguments)` by rank. Raises RankFailedError with the first failing rank's traceback."""
        with tempfile.TemporaryDirectory(prefix="biroute-test-") as folder:
            request = (job.__code__.co_filename, job.__qualname__, arguments)
            connections = self._start(Path(folder) / "rendezvous", pickle.dumps(request))
            try:
                return self._results(connections, timeout_seconds)
            finally:
                self.kill()  # after a failure the others may wait for that rank for ever
                for process in self._processes:
                    process.join()
                self._processes = []

    def pid(self, rank: int) -> int:
        """Process id of a rank, once a job has been sent."""
        return int(self._processes[rank].pid)

    def kill(self) -> None:
        """kill -9 all ranks; in the middle of a job, it fails."""
        for process in self._processes:
            process.kill()

    def _start(self, rendezvous: Path, request: bytes) -> list[Connection]:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED_BEFORE)
        connections = []
        with patch.dict(os.environ, ENVIRONMENT):  # the first call starts the process that imports
            for rank in range(self.world_size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(theirs, rank, self.world_size, rendezvous, request), daemon=True
                )
                process.start()
                theirs.close()
                self._processes.append(process)
                connections.append(ours)
        return connections

    def _results(self, connections: list[Connection], timeout_seconds: float) -> list[Any]:
        results: dict[int, Any] = {}
        while len(results) < self.world_size:
            waiting = [c for rank, c in enumerate(connections) if rank not in results]
            ready = wait(waiting, timeout_seconds)
            if not ready:
                raise RankFailedError(f"ranks {sorted(set(range(self.world_size)) - set(results))} hang")
            for connection in ready:
                rank = connections.index(connection)
                try:
                    ok, value = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    ok, value = False, "the process died"
                if not ok:
                    raise RankFailedError(f"rank {rank}: {value}")
                results[rank] = value
        return [results[rank] for rank in range(self.world_size)]


def _serve(connection: Connection, rank: int, world_size: int, rendezvous: Path, request: bytes) -> None:
    """Do one job as one rank, then stay until the pool ends it: others may still need this rank's sockets."""
    os.environ.update(ENVIRONMENT, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        import torch
        import torch.distributed as dist

        from biroute.parallel.mesh.megatron import prepare_megatron

        torch.set_num_threads(1)
        prepare_megatron(torch.device("cpu"))
        path, name, arguments = pickle.loads(request)
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
        answer = (True, getattr(_load(path), name)(*arguments))
    except BaseException:
        answer = (False, traceback.format_exc())
    connection.send_bytes(pickle.dumps(answer))
    while True:
        signal.pause()


def _load(path: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
