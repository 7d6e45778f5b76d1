"""RMSNorm in one Triton kernel each way: rows are read once and written once, sums in fp32.

Backward also sums the weight's gradient over the rows that a program walks through; the parts of all programs are
added in a fixed order. PyTorch reads the input and its gradient once more for it. The reference is `norm.py`.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_WIDTH = 8192  # elements of a row that fit into the registers of a program
ELEMENTS = 2048  # of a program at once, if a row has no more
PROGRAMS = 512  # of backward: a few for each multiprocessor


@triton.jit
def norm_rows(x_ptr, weight_ptr, out_ptr, scale_ptr, rows, width, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """x [rows, width] -> out, x * scale * weight; scale [rows], 1 / rms(x)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / width + eps)
    out = x * scale[:, None] * weight[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, scale, mask=row < rows)


@triton.jit
def norm_rows_backward(
    x_ptr, weight_ptr, scale_ptr, dout_ptr, dx_ptr, part_ptr, rows, width, blocks, programs,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """x, dout [rows, width] -> dx; part [programs, width], what a program's rows add to the weight's gradient."""
    program = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    part = tl.zeros([WIDTH], tl.float32)
    for block in range(program, blocks, programs):
        row = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        at = row[:, None] * width + column[None, :]
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)[:, None]
        normed = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * scale
        dout = tl.load(dout_ptr + at, mask=inside, other=0.0).to(tl.float32)
        part += tl.sum(dout * normed, 0)
        dnormed = dout * weight[None, :]
        dx = (dnormed - normed * (tl.sum(dnormed * normed, 1) / width)[:, None]) * scale
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(part_ptr + program * width + column, part, mask=column < width)


def normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., C], contiguous -> x / rms(x) * weight, in x's dtype, and 1 / rms(x), fp32 [rows]."""
    rows, width, sizes = _sizes(x)
    out, scale = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    norm_rows[(triton.cdiv(rows, sizes["ROWS"]),)](x, weight, out, scale, rows, width, eps, **sizes)
    return out, scale


def normalize_backward(x: Tensor, weight: Tensor, scale: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight, from that of the output; all contiguous."""
    rows, width, sizes = _sizes(x)
    blocks = triton.cdiv(rows, sizes["ROWS"])
    programs = min(PROGRAMS, blocks)
    dx, part = torch.empty_like(x), torch.empty(programs, width, dtype=torch.float32, device=x.device)
    norm_rows_backward[(programs,)](x, weight, scale, dout, dx, part, rows, width, blocks, programs, **sizes)
    return dx, part.sum(0).to(weight.dtype)


def _sizes(x: Tensor) -> tuple[int, int, dict[str, int]]:
    width = x.shape[-1]
    whole = triton.next_power_of_2(width)
    warps = 8 if whole <= ELEMENTS else 16
    return x.numel() // width, width, {"ROWS": max(1, ELEMENTS // whole), "WIDTH": whole, "num_warps": warps}
