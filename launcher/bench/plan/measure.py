"""Train a case for some steps with real processes, and return what its ranks sent, held and took.

The ranks of each case are forked anew from one process that has imported everything, so nothing of an earlier case is
in their memory, and importing is paid for once.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from biroute.launcher.bench.plan.cases import VOCABULARY, Case
from biroute.launcher.bench.plan.collectives import Calls, counted_collectives
from biroute.launcher.bench.several_processes import CPU, reports_of_ranks
from biroute.parallel.engine.engine import Engine, Microbatch, build_engine
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
        torch.multiprocessing.ProcessException: a rank failed.
    """
    return reports_of_ranks(_measure, (case, seconds), case.ranks, preload=IMPORTED_BEFORE)


def _measure(case: Case, seconds: float) -> dict[str, Any]:
    return _timed(case, seconds) if seconds else _counted(case)


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
