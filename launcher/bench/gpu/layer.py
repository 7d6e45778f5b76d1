"""Part of `biroute bench gpu`: one routed layer beside dense attention.

Dense and routed runs alternate, so that both run under the same conditions; each number is the median of the repeats.
On CUDA times are those between events of the device; elsewhere, where the tests run, wall time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from biroute.launcher.bench.attention.measure import peak_bytes
from biroute.launcher.bench.gpu.targets import Compared
from biroute.model.attention.bi_level import bi_level_attention, dense_attention
from biroute.model.attention.grid import AttentionPath
from biroute.model.attention.routing import route_regions
from biroute.model.attention.rule import RouteRule

DESCRIPTORS = (8, 1)  # of a region: those that a layer is measured with, and those that it is compared with


@dataclass(frozen=True)
class Layer:
    """The sizes of a layer, which do not depend on the length of a sequence."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128
    region_size: int = 64
    topk: int = 32
    dtype: torch.dtype = torch.bfloat16

    def rule(self, block: int, descriptors: int = DESCRIPTORS[0]) -> RouteRule:
        """How query blocks of `block` tokens choose regions."""
        return RouteRule(self.region_size, block, self.topk, True, descriptors_per_region=descriptors)


class Inputs(NamedTuple):
    """q [1, H, S, D], k and v [1, G, S, D], which require gradients, and dout [1, H, S, D]: white noise."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @staticmethod
    def draw(layer: Layer, tokens: int, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def noise(heads: int) -> Tensor:
            return torch.randn(
                1, heads, tokens, layer.head_size, generator=generator, device=device, dtype=layer.dtype
            )

        q, k, v = (noise(heads).requires_grad_() for heads in (layer.num_heads, *2 * (layer.num_kv_heads,)))
        return Inputs(q, k, v, noise(layer.num_heads))

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def held_bytes(self) -> int:
        """Bytes of the inputs and the gradient of the output, which are there before a run."""
        return sum(x.nbytes for x in self)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensors that dense attention cannot do without: these, output, log-sum-exps, gradients."""
        return 2 * self.held_bytes + 4 * self.q.numel() // self.q.shape[3]


class Marks:
    """Moments of a device's work."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._marks = device, list[Any]()
        self.mark()

    def mark(self) -> None:
        """Remember this moment, without waiting for the device."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Wait for the device, and return the seconds between all moments."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return [first.elapsed_time(second) / 1e3 for first, second in pairwise(self._marks)]
        return [second - first for first, second in pairwise(self._marks)]


def measure_layer(
    layer: Layer, tokens: int, block: int, device: torch.device, repeats: int, route: Tensor | None = None
) -> dict[str, Any]:
    """Measure dense attention and a routed layer of one sequence.

    Args:
        layer: its sizes.
        tokens: S.
        block: Lq.
        device: where.
        repeats: runs of each, after one that warms up and compiles.
        route: int32 [1, G, S // Lq, K]; left out: the router's own choice for white noise, of which neighbours share
            least. The router runs on white noise in any case.

    Returns:
        Seconds, bytes, and seconds of each kernel (CUDA only), as plain values.
    """
    inputs = Inputs.draw(layer, tokens, device)
    chosen = route.to(device).long() if route is not None else choose(inputs, layer, block)

    def dense() -> list[float]:
        marks = Marks(device)
        out = dense_attention(*inputs.leaves, causal=True)
        marks.mark()
        torch.autograd.grad(out, inputs.leaves, inputs.dout)
        marks.mark()
        return marks.seconds()

    def routed() -> list[float]:
        marks = Marks(device)
        for descriptors in DESCRIPTORS:
            choose(inputs, layer, block, descriptors)
            marks.mark()
        out = _attend(inputs, layer, block, chosen)
        marks.mark()
        torch.autograd.grad(out, inputs.leaves, inputs.dout)
        marks.mark()
        return marks.seconds()

    peaks = [inputs.held_bytes + peak_of(call, device) for call in (dense, routed)]  # which also warms up
    runs = [(dense(), routed()) for _ in range(repeats)]
    columns = [statistics.median(column) for column in zip(*(a + b for a, b in runs), strict=True)]
    names = ("dense_forward", "dense_backward", "route", "route_of_one", "forward", "backward")
    return {
        "tokens": tokens,
        "block": block,
        "routes": "random" if route is None else "trained",
        **{f"{name}_seconds": value for name, value in zip(names, columns, strict=True)},
        "dense_peak_bytes": peaks[0],
        "peak_bytes": peaks[1],
        "tensor_bytes": inputs.tensor_bytes,
        "kernels": kernel_seconds(routed, device),
    }


def compared(row: dict[str, Any]) -> Compared:
    """The ratios of a row of `measure_layer`."""
    attention = row["forward_seconds"] + row["backward_seconds"]
    total = row["route_seconds"] + attention
    return Compared(
        forward=row["dense_forward_seconds"] / (row["route_seconds"] + row["forward_seconds"]),
        both=(row["dense_forward_seconds"] + row["dense_backward_seconds"]) / total,
        descriptors=total / (row["route_of_one_seconds"] + attention),
        router=row["route_seconds"] / total,
        memory=row["peak_bytes"] / row["tensor_bytes"],
        memory_of_dense=row["peak_bytes"] / row["dense_peak_bytes"],
    )


def peak_of(call: Callable[[], object], device: torch.device) -> int:
    """Return the peak memory of a call in bytes, without what was there before."""
    if device.type != "cuda":
        return peak_bytes(call)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def kernel_seconds(call: Callable[[], object], device: torch.device) -> dict[str, dict[str, float]]:
    """Return the launches and seconds of each kernel of a call by name, as torch's profiler sees them; CUDA only."""
    if device.type != "cuda":
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize(device)
    events = [event for event in recorded.key_averages() if event.self_device_time_total > 0]
    return {e.key: {"launches": e.count, "seconds": e.self_device_time_total / 1e6} for e in events}


def choose(inputs: Inputs, layer: Layer, block: int, descriptors: int = DESCRIPTORS[0]) -> Tensor:
    """The router's route of the inputs, int64 [1, G, S // Lq, K]."""
    return route_regions(inputs.q.detach(), inputs.k.detach(), layer.rule(block, descriptors))


def _attend(inputs: Inputs, layer: Layer, block: int, route: Tensor) -> Tensor:
    out: Tensor = bi_level_attention(
        *inputs.leaves, route, region_size=layer.region_size, query_block_size=block, causal=True,
        path=kernels_path(inputs.q.device),
    )  # fmt: skip
    return out


def kernels_path(device: torch.device) -> AttentionPath:
    """The path of the kernels; on a CPU Triton's interpreter runs them."""
    return "auto" if device.type == "cuda" else "block_sparse"
