"""`biroute bench hardware`: a hardware profile of this machine, measured with real processes, for `biroute plan`.

Each rank measures its core alone, one after the other, and the slowest one counts. How much longer all ranks take
when they compute at once is one factor, from a whole block: ranks that train seldom do the same operation at the same
moment, and two that multiply matrices at once would be told too slow. Messages are measured together.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from biroute.launcher.bench.cpu_rates import BLOCK, block_step, data_mesh, measure_cpu, measure_optimizer
from biroute.launcher.bench.report import environment_info, make_folder
from biroute.launcher.bench.several_processes import reports_of_ranks
from biroute.launcher.plan.hardware import GIB, CpuRates, HardwareProfile
from biroute.parallel.mesh.mesh import Mesh

FILE = "this-machine.yaml"
MATRIX, ROWS, COPY_ELEMENTS, EXCHANGED_ELEMENTS = 768, 1536, 1 << 21, 1 << 20
FEWEST_REPEATS = 1


@dataclass(frozen=True)
class Measured:
    """What the slowest rank reached; bytes in seconds, without prefix."""

    flops_per_second_fp32: float
    flops_per_second_bf16: float
    memory_bytes_per_second: float
    all_reduce_bytes_per_second: float  # of the bus: 2 (n - 1) / n of the tensor's bytes, over the time
    send_bytes_per_second: float
    latency_seconds: float
    cpu: dict[str, Any]  # fields of `CpuRates`


def default_ranks() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure_hardware(ranks: int, seconds: float) -> Measured:
    """Start `ranks` processes of one thread each, and measure for about `seconds` each rate."""
    return Measured(**_slowest(reports_of_ranks(_measure, (seconds,), ranks)))


def _slowest(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Take of each number the one of the slowest rank: the longest time, the lowest rate."""
    worst: dict[str, Any] = {}
    for name in found[0]:
        values = [one[name] for one in found]
        if isinstance(values[0], dict):
            worst[name] = _slowest(values)
        else:
            worst[name] = max(values) if name.endswith(("_ns", "_ms", "_seconds", "_factor")) else min(values)
    return worst


def _measure(seconds: float) -> dict[str, Any]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = data_mesh(ranks)
    found: dict[str, Any] = {}
    for turn in range(ranks):
        dist.barrier()
        if turn == rank:
            found = _measure_core(seconds, mesh)
    dist.barrier()
    step = block_step(BLOCK, mesh)
    alone = found["cpu"].pop("whole_block_ms") / 1e3
    found["cpu"]["all_ranks_factor"] = max(1.0, _median_seconds(step, seconds, together=True) / alone)
    found["cpu"]["optimizer_gb_per_second"] = measure_optimizer(mesh) / 1e9
    copy = found.pop("copy_seconds")
    if ranks == 1:
        # Nothing is sent; what the profile says of links is never used, and a copy is the best that one could do.
        rate = 4 * COPY_ELEMENTS / copy
        return found | {
            "all_reduce_bytes_per_second": rate, "send_bytes_per_second": rate, "latency_seconds": 0.0
        }  # fmt: skip
    payload, message = torch.rand(EXCHANGED_ELEMENTS), torch.zeros(1)
    reduced = _median_seconds(lambda: dist.all_reduce(payload), seconds, together=True)
    neighbour = rank ^ 1

    def there_and_back(tensor: torch.Tensor) -> None:
        if neighbour < ranks:  # of an odd number of ranks the last one has no partner
            for sends in (rank < neighbour, rank > neighbour):
                dist.send(tensor, neighbour) if sends else dist.recv(tensor, neighbour)

    sent = _median_seconds(lambda: there_and_back(payload), seconds, together=True) / 2
    latency = _median_seconds(lambda: there_and_back(message), seconds, together=True) / 2
    alone = neighbour >= ranks
    return found | {
        "all_reduce_bytes_per_second": 2 * (ranks - 1) / ranks * payload.nbytes / reduced,
        "send_bytes_per_second": float("inf") if alone else payload.nbytes / sent,
        "latency_seconds": 0.0 if alone else latency,
    }


def _measure_core(seconds: float, mesh: Mesh) -> dict[str, Any]:
    """Measure what this rank computes and copies, without messages."""
    source = torch.rand(COPY_ELEMENTS)
    target = torch.empty_like(source)
    copy = _median_seconds(lambda: target.copy_(source), seconds)
    linear_rate = _linear_rate(torch.float32, seconds)
    return {
        "flops_per_second_fp32": linear_rate,
        "flops_per_second_bf16": _linear_rate(torch.bfloat16, seconds),
        "memory_bytes_per_second": 2 * source.nbytes / copy,  # read and written
        "copy_seconds": copy,
        "cpu": measure_cpu(lambda work: _median_seconds(work, seconds), mesh, linear_rate),
    }


def _linear_rate(dtype: torch.dtype, seconds: float) -> float:
    """Return the FLOP/s of a linear layer's three products: forward, and both gradients."""
    weight = torch.rand(MATRIX, MATRIX).to(dtype)
    rows, upstream = (torch.rand(ROWS, MATRIX).to(dtype) for _ in range(2))

    def products() -> None:
        torch.nn.functional.linear(rows, weight)
        upstream @ weight
        upstream.t() @ rows

    return 6 * ROWS * MATRIX**2 / _median_seconds(products, seconds)


def _median_seconds(work: Callable[[], Any], seconds: float, *, together: bool = False) -> float:
    """Return the median time of a call; `together`: all ranks make the same number of calls."""
    work()
    times: list[float] = []

    def once() -> None:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)

    once()
    repeats = max(FEWEST_REPEATS, int(seconds / max(times[0], 1e-9)))
    if together:
        number = torch.tensor([min(repeats, 10_000)])
        dist.broadcast(number, 0)
        repeats = int(number)
    for _ in range(repeats):
        once()
    return statistics.median(times)


def profile_of(measured: Measured, ranks: int) -> HardwareProfile:
    """Return the profile of this machine as one node whose devices are `ranks` processes."""
    link = measured.all_reduce_bytes_per_second / 1e9
    return HardwareProfile(
        device=f"this machine, {ranks} rank(s) of one thread",
        peak_tflops_bf16=measured.flops_per_second_bf16 / 1e12,
        peak_tflops_fp32=measured.flops_per_second_fp32 / 1e12,
        memory_gib=psutil.virtual_memory().total / GIB / ranks,
        memory_gb_per_second=measured.memory_bytes_per_second / 1e9,
        devices_per_node=ranks,
        intra_node_gb_per_second=link,
        inter_node_gb_per_second=link,
        intra_node_latency_us=1e6 * measured.latency_seconds,
        inter_node_latency_us=1e6 * measured.latency_seconds,
        efficiency=1.0,
        cpu=CpuRates.model_validate(measured.cpu),
    )


# How each field of the profile was found.
COMMENTS = {
    "peak_tflops_bf16": f"measured: forward and both gradients of {ROWS:,} rows by a {MATRIX} x {MATRIX} matrix",
    "peak_tflops_fp32": "the same",
    "memory_gib": "memory of the machine over its ranks",
    "memory_gb_per_second": "measured: a copy, read and written",
    "intra_node_gb_per_second": "measured: all-reduce over gloo, bandwidth of the bus; to one neighbour: {send:.3g}",
    "inter_node_gb_per_second": "assumed: as inside; a single machine was measured",
    "intra_node_latency_us": "measured: one number to a neighbour over gloo",
    "inter_node_latency_us": "assumed: as inside",
    "efficiency": "of rates that were measured, not of a data sheet",
}


def profile_text(profile: HardwareProfile, measured: Measured) -> str:
    """Return the profile as YAML, with how each number was found."""
    facts = environment_info(threads=1)
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    lines = [f"# Made by `{facts['command']}` on {date}: {facts['machine']}; {facts['software']}."]
    values = profile.model_dump(exclude_none=True)
    rates = values.pop("cpu")
    for name, value in values.items():
        comment = COMMENTS.get(name, "").format(send=measured.send_bytes_per_second / 1e9)
        lines.append(f"{name}: {_number(value)}" + (f" # {comment}" if comment else ""))
    lines.append("cpu: # each rate measured apart, at sizes of its own: launcher/bench/cpu_rates.py")
    for name, value in rates.items():
        if isinstance(value, dict):
            value = "{" + ", ".join(f"{key}: {_number(one)}" for key, one in value.items()) + "}"
        about = CpuRates.model_fields[name].description
        lines.append(f"  {name}: {value if isinstance(value, str) else _number(value)} # {about}")
    return "\n".join(lines) + "\n"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def write_profile(text: str, folder: Path) -> Path:
    """Write the profile into a folder, which is created, and return its path.

    Raises:
        UsageError: the folder cannot be created.
    """
    make_folder(folder)
    path = folder / FILE
    path.write_text(text, encoding="utf-8")
    return path
