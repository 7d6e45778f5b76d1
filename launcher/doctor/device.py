"""Checks of the device that training would use: what it is, whether routed attention is right, how fast it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from biroute.launcher.doctor.check import Check
from biroute.launcher.doctor.software import driver
from biroute.launcher.ranks.gpu_check import gpu_problems
from biroute.model.attention import reference
from biroute.model.attention.bi_level import bi_level_attention
from biroute.model.attention.routing import route_regions
from biroute.model.attention.rule import RouteRule

# The largest error of a gradient that sums in fp32 leave, relative to its largest element.
_LARGEST_ERROR = 1e-4
_SIZES = {"cuda": (8192, 1 << 30), "cpu": (1024, 1 << 28)}  # side of the matrices, bytes that are copied


def device_checks(device: torch.device, expects_gpu: bool) -> Iterator[Check]:
    """Check one device.

    Args:
        device: the device of this rank.
        expects_gpu: whether a missing GPU is a problem.
    """
    yield Check("CUDA of torch", str(torch.version.cuda or "none"))
    yield Check("driver", driver())
    yield Check("GPUs", _gpus(), "; ".join(gpu_problems(1)) if expects_gpu or torch.cuda.is_available() else "")
    if device.type == "cuda":
        yield Check("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    yield attention_check(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    yield Check(
        f"matrix product on {device}, {str(dtype).removeprefix('torch.')}",
        f"{product_tflops(device, dtype):.3g} TFLOP/s",
    )
    yield Check(f"memory of {device}", f"{copied_bytes_per_second(device) / 1e9:.3g} GB/s read and written")


def _gpus() -> str:
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in found) or "none"


def attention_check(device: torch.device) -> Check:
    """Compare a routed layer's values and gradients on the device with the reference, in plain loops on the CPU."""
    rule = RouteRule(region_size=16, query_block_size=1, topk=3, causal=True)
    sizes: dict[str, Any] = {"region_size": rule.region_size, "query_block_size": 1, "causal": True}
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 128, 32, generator=generator) for heads in (4, 2, 2))
    on_device = [x.to(device).requires_grad_() for x in (q, k, v)]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    try:
        route = route_regions(on_device[0], on_device[1], rule)
        found: Tensor = bi_level_attention(on_device[0], on_device[1], on_device[2], route, **sizes)
        gradients = torch.autograd.grad(found.square().sum(), on_device)
    except Exception as failure:
        return Check(
            "routed attention", "failed", f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
        )
    wanted_route = reference.route_regions(q, k, rule)
    wanted = reference.bi_level_attention(exact[0], exact[1], exact[2], wanted_route, **sizes)
    wanted_gradients = torch.autograd.grad(wanted.square().sum(), exact)
    error = max(_relative(x, y) for x, y in zip((found, *gradients), (wanted, *wanted_gradients), strict=True))
    same_route = torch.equal(route.cpu(), wanted_route)
    value = f"on {device}: {'the same' if same_route else 'another'} route as the reference, error {error:.1e}"
    wrong = "" if same_route and error < _LARGEST_ERROR else "it must equal the reference; please report this device"
    return Check("routed attention", value, wrong)


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().cpu().double() - wanted.detach()).abs().max() / wanted.detach().abs().max())


def product_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the rate of a large matrix product, in TFLOP/s."""
    side, _ = _SIZES[device.type]
    x, y = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _seconds(lambda: x @ y, device) / 1e12


def copied_bytes_per_second(device: torch.device) -> float:
    """Measure the rate of a large copy inside the device's memory, bytes read and written, in bytes/s."""
    _, size = _SIZES[device.type]
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def _seconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Return the shortest time of a few, after one that warms up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(repeats + 1):
        wait()
        began = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - began)
    return min(times[1:])
