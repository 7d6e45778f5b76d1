"""Real gloo ranks for tests: started once a session, then sent functions. Starting them anew costs 13 s a process.

`pool.run(job, *arguments)` calls `job(*arguments)` on every rank and returns the results, rank 0's first. Jobs are
module-level functions of test files; arguments and results must pickle.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any


class RankFailedError(Exception):
    """A job raised on some rank; carries that rank's traceback."""


class WorkerPool:
    """`world_size` processes joined in one gloo group; restarted after a job that failed or hung."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def run(self, job: Callable[..., Any], *arguments: Any, timeout_seconds: float = 600.0) -> list[Any]:
        """Results of `job(*arguments)` by rank. Raises RankFailedError with the first failing rank's traceback."""
        if not self._processes:
            self._start()
        request = pickle.dumps((job.__code__.co_filename, job.__qualname__, arguments))
        for connection in self._connections:
            connection.send_bytes(request)
        results: dict[int, Any] = {}
        while len(results) < self.world_size:
            waiting = [c for rank, c in enumerate(self._connections) if rank not in results]
            ready = wait(waiting, timeout_seconds)
            if not ready:
                self.stop()
                raise RankFailedError(f"ranks {sorted(set(range(self.world_size)) - set(results))} hang")
            for connection in ready:
                rank = self._connections.index(connection)
                try:
                    ok, value = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    ok, value = False, "the process died"
                if not ok:
                    self.stop()  # the others may wait for this rank for ever
                    raise RankFailedError(f"rank {rank}: {value}")
                results[rank] = value
        return [results[rank] for rank in range(self.world_size)]

    def pid(self, rank: int) -> int:
        """Process id of a rank, once a job has been sent."""
        return int(self._processes[rank].pid)

    def kill(self) -> None:
        """kill -9 all ranks in the middle of a job, which then fails."""
        for process in self._processes:
            process.kill()

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._connections = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        rendezvous = Path(tempfile.mkdtemp(prefix="biroute-test-")) / "rendezvous"
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.world_size, rendezvous), daemon=True)
            process.start()
            self._processes.append(process)
            self._connections.append(ours)


def _serve(connection: Connection, rank: int, world_size: int, rendezvous: Path) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu"
    )
    import torch

    from biroute.parallel.megatron import prepare_megatron

    torch.set_num_threads(1)
    prepare_megatron(torch.device("cpu"))
    modules: dict[str, ModuleType] = {}
    for job in itertools.count():
        path, name, arguments = pickle.loads(connection.recv_bytes())
        try:
            _join(rank, world_size, Path(f"{rendezvous}-{job}"))
            if path not in modules:
                modules[path] = _load(path)
            answer = (True, getattr(modules[path], name)(*arguments))
            _leave()
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))


def _join(rank: int, world_size: int, rendezvous: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)


def _leave() -> None:
    """Close every group of a job: each keeps threads that poll, and an engine makes a dozen groups."""
    import torch.distributed as dist
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    from biroute.parallel.megatron import stop_process_groups

    gc.collect()  # engines and their hooks first
    stop_process_groups()
    comm.cdb = None
    for name, value in vars(groups).items():  # DeepSpeed keeps groups by name and would hand out closed ones
        if isinstance(value, dist.ProcessGroup):
            setattr(groups, name, None)
    dist.destroy_process_group()


def _load(path: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
