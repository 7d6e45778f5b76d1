"""Write docs/benchmarks/gpu_on_paper.md from the counts beside it: `make docs`. The same tree gives the same bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biroute.launcher.plan.hardware import HardwareProfile, load_hardware

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "gpu_on_paper.md"
COSTS = PAGE.with_suffix(".json")

HEADS, GROUPS, HEAD_SIZE, REGION, ELEMENT = 32, 8, 128, 64, 2
LAUNCH_SECONDS = 5e-6

# Dense attention (PyTorch's), bf16, H 32, G 8, D 128, causal, on one NVIDIA H200, 2026-11-26, in ms: forward, and
# forward and backward together.
DENSE_H200 = {8_192: (0.93, 3.57), 32_768: (13.9, 53.5), 131_072: (260.0, 880.0)}
# What earlier kernels reached there, at 131,072 tokens: bytes (or operations, or affinities) and milliseconds.
DENSE_FLOPS = 2 * 131_072**2 * HEADS * HEAD_SIZE
MEASURED = {
    "products": (DENSE_FLOPS, 260.0, "dense attention, forward: {:.0f} TFLOP/s"),
    "cache": (1.1e12, 194.0, "a kernel that reads each query's keys and values anew, from the cache: {:.1f} TB/s"),
    "stream": (69e9, 22.0, "region by region, forward: {:.1f} TB/s of memory"),
    "back": (103e9, 44.0, "the same, backward: {:.1f} TB/s"),
    "merge": (35e9, 21.4, "joining the partial results of each query: {:.1f} TB/s"),
    "held": (1.43e9, 10.0, "selecting: {:.2f} * 10^12 affinities held on chip per second"),
}


@dataclass(frozen=True)
class Rates:
    """What a part of the work takes its time from; per second."""

    products: float  # operations of matrix products
    cache: float  # bytes that come from the second cache
    stream: float  # bytes of memory: kernels that stream
    back: float  # the same, with the gradients of keys and values held in registers
    merge: float  # the same, many short pieces
    held: float  # affinities selected from

    @staticmethod
    def expected(profile: HardwareProfile) -> Rates:
        """The rates measured on an H200, those of memory in proportion to its bandwidth."""
        memory = profile.memory_gb_per_second / load_hardware("h200").memory_gb_per_second
        peak = profile.peak_tflops_bf16 / load_hardware("h200").peak_tflops_bf16
        found = {name: amount / (ms / 1e3) for name, (amount, ms, _) in MEASURED.items()}
        for name in found:
            found[name] *= memory if name in ("stream", "back", "merge") else peak
        return Rates(**found)


def layer_seconds(row: dict[str, Any], rates: Rates, descriptors: str = "8") -> dict[str, float]:
    """Expected seconds of the parts of a layer: router, forward, backward."""
    kernels, torch = row["kernels"], row["torch"]
    partials = kernels["forward"].get("region_forward", {}).get("written", 0)
    partial_dq = partials * HEAD_SIZE * ELEMENT / (HEAD_SIZE * ELEMENT + 4)

    def launched(side: str) -> float:
        number = sum(kernel["launches"] for kernel in kernels[side].values()) + torch[side]["launches"]
        return number * LAUNCH_SECONDS + torch[side]["moved"] / rates.stream

    def tiles(kernel: dict[str, int], merged: float) -> float:
        shared = max(kernel["flops"] / rates.products, (kernel["read"] - merged) / rates.cache)
        return shared + merged / rates.merge + kernel["written"] / rates.stream

    forward = launched("forward") + tiles(kernels["forward"]["query_forward"], partials)
    if partials:
        region = kernels["forward"]["region_forward"]
        forward += max(region["flops"] / rates.products, (region["read"] + region["written"]) / rates.stream)
    backward = launched("backward") + tiles(kernels["backward"]["query_backward"], partial_dq)
    region = kernels["backward"]["region_backward"]
    backward += max(region["flops"] / rates.products, (region["read"] + region["written"]) / rates.back)
    for name in ("output_delta", "add_extra_units"):
        kernel = kernels["backward"].get(name, {"read": 0, "written": 0})
        backward += (kernel["read"] + kernel["written"]) / rates.stream
    router = row["router"][descriptors]
    chosen = router["route_blocks"]
    routing = router["moved"] / rates.stream + (router["launches"] + chosen["launches"]) * LAUNCH_SECONDS
    routing += max(chosen["flops"] / rates.products, (chosen["read"] + chosen["written"]) / rates.cache)
    routing += chosen["held"] / rates.held
    return {"router": routing, "forward": forward, "backward": backward}
