"""Train a case for some steps with real processes, and return what its ranks sent, held and took.

The ranks of each case are forked anew from one process that has imported everything, so nothing of an earlier case is
in their memory, and importing is paid for once.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from biroute.configs.schema import TrainConfig
from biroute.launcher.bench.plan.cases import VOCABULARY, Case
from biroute.launcher.bench.plan.collectives import Calls, counted_collectives
from biroute.launcher.bench.single_process import CPU
from biroute.launcher.ranks.environment import RENDEZVOUS_FILE, find_rank_environment
from biroute.launcher.ranks.rendezvous import join_processes
from biroute.launcher.start.library_warnings import ignore_library_warnings
from biroute.parallel.engine.engine import Engine, Microbatch, build_engine
from biroute.parallel.mesh.megatron import prepare_megatron
from biroute.parallel.mesh.mesh import Mesh, build_mesh

IMPORTED_BEFORE = ["biroute.launcher.bench.plan.measure"]
LEARNING_RATE = 1e-3
WARM_UP_STEPS = 2  # the first step allocates, the second one is the first with moments of AdamW
FEWEST_STEPS = 3
SMALL = {"hidden_size": 96, "head_size": 8, "ffn_hidden_size": 64}  # of a model that warms up
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of glibc's mallopt
RETURNED_BYTES = 1 << 16  # what is freed of this size and more goes back to the system at once
# Scalars, and sums of the loss for each token, are counted apart: a plan leaves them out.
SCALAR_BYTES = 8


def measure(case: Case, seconds: float) -> list[dict[str, Any]]:
    """Run a case.

    Args:
        case: the model and its layout.
        seconds: of steps to time, about; 0 to count bytes and memory instead, which slows the steps.

    Returns:
        What each rank found: `step_seconds` and `phases` (seconds by phase), or `calls` and `peak_bytes`.

    Raises:
        RuntimeError: a rank failed.
    """
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # some libraries warn when they are imported
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_BEFORE)
    with tempfile.TemporaryDirectory(prefix="biroute-bench-") as folder:
        ranks = [context.Process(target=_rank, args=(case, rank, seconds, folder)) for rank in range(case.ranks)]
        for one in ranks:
            one.start()
        for one in ranks:
            one.join()
        if any(one.exitcode for one in ranks):
            raise RuntimeError(f"{case.name}: exit statuses {[one.exitcode for one in ranks]}")
        return [json.loads(Path(folder, f"{rank}.json").read_text("utf-8")) for rank in range(case.ranks)]


def _rank(case: Case, rank: int, seconds: float, folder: str) -> None:
    ignore_library_warnings()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(case.ranks),
        RENDEZVOUS_FILE: str(Path(folder, "rendezvous")),
        "DS_ACCELERATOR": "cpu",
    }
    prepare_megatron(CPU)
    join_processes(find_rank_environment(), TrainConfig(device="cpu", threads_per_rank=1))
    found = _timed(case, seconds) if seconds else _counted(case)
    Path(folder, f"{rank}.json").write_text(json.dumps(found), "utf-8")
    dist.barrier()
    os._exit(0)  # DeepSpeed's groups keep threads that would outlast an orderly end


def _timed(case: Case, seconds: float) -> dict[str, Any]:
    engine, batches = _engine(case, build_mesh(case.work().layout))
    for _ in range(WARM_UP_STEPS):
        engine.train_step(batches, LEARNING_RATE)
    started = time.perf_counter()
    engine.train_step(batches, LEARNING_RATE)
    count = torch.tensor([max(FEWEST_STEPS, round(seconds / (time.perf_counter() - started)))])
    dist.broadcast(count, 0)
    engine.clock.take()
    times = []
    for _ in range(int(count)):
        engine.clock.begin_step(logged=True)
        started = time.perf_counter()
        engine.train_step(batches, LEARNING_RATE)
        engine.clock.end_step()
        times.append(time.perf_counter() - started)
    return {"step_seconds": times, "median_seconds": statistics.median(times), "phases": engine.clock.take()}


def _counted(case: Case) -> dict[str, Any]:
    # So that what a process holds is what its tensors hold, and not what its allocator keeps for the next ones.
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, RETURNED_BYTES)
    libc.mallopt(M_TRIM_THRESHOLD, RETURNED_BYTES)
    mesh = build_mesh(case.work().layout)
    small, batches = _engine(replace(case, model=case.model | SMALL), mesh)  # loads what has been imported only
    for _ in range(WARM_UP_STEPS):
        small.train_step(batches, LEARNING_RATE)
    del small, batches
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # forgets the high-water mark
    before = _status_bytes("VmRSS")
    engine, batches = _engine(case, mesh)
    for _ in range(WARM_UP_STEPS):
        engine.train_step(batches, LEARNING_RATE)
    peak = _status_bytes("VmHWM") - before
    if engine.traffic is not None:
        engine.traffic.clear()
    with counted_collectives(_axes(mesh)) as calls:
        engine.train_step(batches, LEARNING_RATE)
    received = {}
    if engine.traffic is not None:
        for (layer, kind), sizes in engine.traffic.received.items():
            received[f"{layer} {kind}"] = int(sizes.sum())
    return {"peak_bytes": peak, "calls": _rows(calls), "received": received}


def _engine(case: Case, mesh: Mesh) -> tuple[Engine, list[Microbatch]]:
    """Build the engine and this rank's microbatches of a step, the same in each step."""
    config = case.config()
    generator = torch.Generator().manual_seed(mesh.at.data)
    size, length = config.train.microbatch_size, config.model.sequence_length
    batches = []
    for _ in range(case.work().microbatches):
        tokens = torch.randint(VOCABULARY, (size, length + 1), generator=generator)
        inputs, labels = (mesh.own_tokens(x.contiguous()) for x in (tokens[:, :-1], tokens[:, 1:]))
        batches.append(Microbatch(inputs, labels))
    return build_engine(config, mesh, CPU), batches


def _status_bytes(name: str) -> int:
    """Return a number of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def _axes(mesh: Mesh) -> dict[str, str]:
    """Return the axis of each process group, by the group's name. Pipelines send in the group of all ranks."""
    groups = mesh.groups
    named = {"tensor": groups.tp, "pipeline": groups.pp, "data": groups.dp_cp, "region": groups.cp}
    return {group.group_name: axis for axis, group in named.items()}


def _rows(calls: Calls) -> list[tuple[str, str, int, int]]:
    """Return (axis, operation, bytes of the tensor, calls) of collectives between several ranks."""
    return [
        (axis if isinstance(axis, str) else "pipeline", name, size, number)
        for (axis, name, size), number in calls.items()
        if number and size > SCALAR_BYTES
    ]
