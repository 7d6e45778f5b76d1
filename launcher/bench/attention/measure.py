"""`biroute bench attention`: time and memory of routed attention compared with dense attention, forward and backward.

Dense and routed runs alternate, so that both run under the same conditions; every number is the median of the
repeats. The time of routed attention includes routing. With one thread, the clock is the CPU time of this process,
which other processes affect little.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from biroute.configs.errors import UsageError
from biroute.launcher.bench.report import environment_info, say
from biroute.model.attention.bi_level import bi_level_attention, dense_attention
from biroute.model.attention.grid import AttentionPath
from biroute.model.attention.routing import route_regions
from biroute.model.attention.rule import RouteRule

LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384, 32_768)
# Beyond this length, a path that is not suited to a setting takes longer than dense attention.
LONGEST_FOR_EVERY_PATH = 4096
EVERY_PATH: tuple[AttentionPath, ...] = ("auto", "query_major", "region_major")
# The memory profiler records every operation; beyond this length, its records take gigabytes.
LONGEST_FOR_MEMORY = 16_384
SLOPE_FROM = 2048


@dataclass(frozen=True)
class Setting:
    """The sizes of one attention layer."""

    name: str
    num_tokens: int
    region_size: int
    topk: int
    query_block_size: int
    num_kv_heads: int = 2
    num_heads: int = 8
    head_size: int = 64
    descriptors_per_region: int = 1
    target: float | None = None  # the ratio to reach

    @property
    def ideal(self) -> float:
        """The ratio of the operations of dense causal attention to those of routed attention."""
        return self.num_tokens / (2 * min(self.topk * self.region_size, self.num_tokens))


TARGETS = (
    Setting("one route per region", 16_384, 64, 8, 64, target=13.0),
    Setting("one route per region, 8 key/value heads", 16_384, 64, 8, 64, num_kv_heads=8, target=9.0),
    Setting("one route per 8 tokens", 16_384, 64, 8, 8, target=8.0),
    Setting("one route per token", 16_384, 64, 8, 1, target=6.0),
    Setting("the same, 32 descriptors", 16_384, 64, 8, 1, descriptors_per_region=32, target=6.0),
    Setting("one route per token, small regions", 16_384, 16, 32, 1, target=3.0),
    Setting("the same, 8 descriptors", 16_384, 16, 32, 1, descriptors_per_region=8, target=3.0),
    Setting("one route per region, short", 2048, 64, 8, 64, target=1.6),
)


def automatic_region_size(num_tokens: int) -> int:
    """Return the power of two nearest to 2.5 S^(1/3); with Lq = L and fixed topk, the total cost grows as S^(4/3)."""
    return 2 ** round(math.log2(2.5 * num_tokens ** (1 / 3)))


def check_lengths(lengths: Sequence[int]) -> None:
    """Check that every length is whole regions in all settings of the sweep.

    Raises:
        UsageError: one is not.
    """
    for num_tokens in lengths:
        region_size = max(setting.region_size for setting in sweep_settings(num_tokens))  # all are powers of two
        if num_tokens % region_size:
            near = max(512, region_size * round(num_tokens / region_size))
            raise UsageError(f"--length {num_tokens} is no multiple of a region's {region_size} tokens; use {near}")


def sweep_settings(num_tokens: int) -> list[Setting]:
    """Return the settings that are measured at every length."""
    automatic = automatic_region_size(num_tokens)
    return [
        Setting("per region, automatic L", num_tokens, automatic, 8, automatic),
        Setting("per token", num_tokens, 64, 8, 1),
        Setting("per token, small regions", num_tokens, 16, 32, 1),
    ]


@dataclass(frozen=True)
class _Wanted:
    """A setting to measure, the paths to measure it with, and the table that it belongs to."""

    setting: Setting
    paths: tuple[AttentionPath, ...]
    table: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The key of settings that are compared with the same run of dense attention."""
        one = self.setting
        return one.num_tokens, one.num_kv_heads, one.num_heads, one.head_size


def run_bench(
    lengths: Sequence[int] = LENGTHS,
    repeats: int = 3,
    targets: Sequence[Setting] = TARGETS,
    layout: str = "heads_first",
    train_steps: Callable[[Callable[[], float], int], list[dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Measure the settings with a target and a sweep over lengths, and return the results as plain values.

    Args:
        lengths: sequence lengths of the sweep, in tokens.
        repeats: runs of each setting.
        targets: settings with a target.
        layout: memory layout of the inputs: "heads_first" for contiguous [B, H, S, D], "tokens_first" for the
            [B, S, H, D] of a projection.
        train_steps: `train_step.measure_train_steps` to measure whole training steps as well; None not to.
    """
    clock_name, now = _clock()
    about_run = environment_info()  # recorded first, since the code may change during the run
    wanted = [_Wanted(setting, ("auto",), "targets") for setting in targets]
    for num_tokens in lengths:
        paths = EVERY_PATH if num_tokens <= LONGEST_FOR_EVERY_PATH else EVERY_PATH[:1]
        wanted += [_Wanted(setting, paths, "sweep") for setting in sweep_settings(num_tokens)]
    tables: dict[str, list[dict[str, Any]]] = {"targets": [], "sweep": []}
    for _, same in groupby(sorted(wanted, key=lambda one: one.shape), key=lambda one: one.shape):
        for name, rows in _measure(list(same), repeats, layout).items():
            tables[name] += rows
    return {
        "benchmark": "attention",
        "environment_info": about_run,
        "settings": {"repeats": repeats, "layout": layout, "precision": "fp32", "clock": clock_name},
        **tables,
        "slope": slope(tables["sweep"], sweep_settings(SLOPE_FROM)[0].name),
        "break_even": {s.name: break_even(tables["sweep"], s.name) for s in sweep_settings(SLOPE_FROM)},
        "train_steps": [] if train_steps is None else train_steps(now, repeats),
    }


def slope(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    """Return the least-squares slope of log time over log length from SLOPE_FROM tokens on; None for one point."""
    points = [
        (math.log(row["num_tokens"]), math.log(row["seconds"]))
        for row in rows
        if row["name"] == name and row["path"] == "auto" and row["num_tokens"] >= SLOPE_FROM
    ]
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def break_even(rows: Sequence[dict[str, Any]], name: str) -> int | None:
    """Return the shortest measured length from which on routed attention is never slower than dense."""
    mine = sorted(
        (row for row in rows if row["name"] == name and row["path"] == "auto"), key=lambda row: row["num_tokens"]
    )
    length = None
    for row in reversed(mine):
        if row["ratio"] < 1.0:
            break
        length = row["num_tokens"]
    return length


def _measure(wanted: Sequence[_Wanted], repeats: int, layout: str) -> dict[str, list[dict[str, Any]]]:
    """Measure settings of one length and head shape, and dense attention once; returns the rows of each table."""
    first = wanted[0].setting
    inputs = _inputs(first, layout)
    calls: dict[tuple[int, str], Callable[[], list[float]]] = {(-1, "dense"): partial(_dense, inputs)}
    for number, one in enumerate(wanted):
        for path in one.paths:
            calls[number, path] = partial(_routed, inputs, one.setting, path)
    peaks: dict[tuple[int, str], int | None] = {}
    for key, call in calls.items():  # this is also the warm-up
        if first.num_tokens <= LONGEST_FOR_MEMORY:
            peaks[key] = peak_bytes(call)
        else:
            call()
    times: dict[tuple[int, str], list[list[float]]] = {key: [] for key in calls}
    for _ in range(repeats):
        for key, call in calls.items():
            times[key].append(call())
    dense = _row(first, "dense", times.pop((-1, "dense")), peaks.get((-1, "dense")))
    dense |= {"name": "dense", "target": None, "ideal": None, "ratio": 1.0, "of_ideal": None}
    tables = {one.table: [dense] for one in wanted}
    for (number, name), measured in times.items():
        setting = wanted[number].setting
        row = _row(setting, name, measured, peaks.get((number, name)))
        ratio = dense["seconds"] / row["seconds"]
        tables[wanted[number].table].append(row | {"ratio": ratio, "of_ideal": ratio / setting.ideal})
    rows = [row for table in tables.values() for row in table]
    say("; ".join(f"{r['num_tokens']} {r['name']} {r['path']} {r['seconds']:.3f} s {r['ratio']:.2f}x" for r in rows))
    return tables


def _row(setting: Setting, path: str, measured: Sequence[Sequence[float]], peak: int | None) -> dict[str, Any]:
    route, forward, backward = (statistics.median(column) for column in zip(*measured, strict=True))
    total = statistics.median(sum(parts) for parts in measured)
    seconds = {"seconds": total, "route_seconds": route, "forward_seconds": forward, "backward_seconds": backward}
    peak_mib = None if peak is None else peak / (1 << 20)
    return {**asdict(setting), "ideal": setting.ideal, "path": path, **seconds, "peak_mib": peak_mib}


@dataclass(frozen=True)
class _Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


def _inputs(setting: Setting, layout: str) -> _Inputs:
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> Tensor:
        if layout == "tokens_first":
            return torch.randn(1, setting.num_tokens, heads, setting.head_size, generator=generator).transpose(1, 2)
        return torch.randn(1, heads, setting.num_tokens, setting.head_size, generator=generator)

    groups = setting.num_kv_heads
    q, k, v, dout = draw(setting.num_heads), draw(groups), draw(groups), draw(setting.num_heads)
    return _Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout)


def _clock() -> tuple[str, Callable[[], float]]:
    if torch.get_num_threads() == 1:
        return "CPU time of the process", time.process_time
    return "wall time", time.perf_counter


def _dense(x: _Inputs) -> list[float]:
    return _timed(lambda: None, lambda _: dense_attention(x.q, x.k, x.v, causal=True), x)


def _routed(x: _Inputs, setting: Setting, path: AttentionPath) -> list[float]:
    sizes: dict[str, Any] = {
        "region_size": setting.region_size,
        "query_block_size": setting.query_block_size,
        "causal": True,
    }
    routing: dict[str, Any] = {"topk": setting.topk, "descriptors_per_region": setting.descriptors_per_region}
    return _timed(
        lambda: route_regions(x.q, x.k, RouteRule(**routing, **sizes)),
        lambda route: bi_level_attention(x.q, x.k, x.v, route, path=path, **sizes),
        x,
    )


def _timed(choose_route: Callable[[], Any], forward: Callable[[Any], Tensor], x: _Inputs) -> list[float]:
    """Return the seconds of routing, forward and backward."""
    now = _clock()[1]
    marks = [now()]
    route = choose_route()
    marks.append(now())
    out = forward(route)
    marks.append(now())
    torch.autograd.grad(out, (x.q, x.k, x.v), x.dout)
    marks.append(now())
    return [later - earlier for earlier, later in pairwise(marks)]


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return the peak memory of a call in bytes, without earlier allocations, as PyTorch's allocator counts it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    # There is no public interface to single allocations; the public tables only have sums per operator.
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
