"""SwiGLU in one Triton kernel each way: every element is read once and written once, sums and products in fp32.

The reference is `swiglu.py`. PyTorch's operations round silu to the run's precision before the product; here only
the result is rounded.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, WIDTH = 4, 512  # elements of a program


@triton.jit
def place(rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows and columns of a program's elements [ROWS, WIDTH], and which are real."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    return row, column, (row < rows) & (column < width)


@triton.jit
def gate_rows(x_ptr, out_ptr, rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """x [rows, 2 width] -> out [rows, width]."""
    row, column, inside = place(rows, width, ROWS, WIDTH)
    at = x_ptr + row * (2 * width) + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gate_rows_backward(x_ptr, dout_ptr, dx_ptr, rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """x [rows, 2 width] and dout [rows, width] -> dx [rows, 2 width]."""
    row, column, inside = place(rows, width, ROWS, WIDTH)
    at = row * (2 * width) + column
    gate = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + at + width, mask=inside, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    kind = dx_ptr.dtype.element_ty
    tl.store(dx_ptr + at, (dout * up * share * (1.0 + gate * (1.0 - share))).to(kind), mask=inside)
    tl.store(dx_ptr + at + width, (dout * gate * share).to(kind), mask=inside)


def gate(x: Tensor) -> Tensor:
    """x [..., 2 F] -> silu(first half) * second half [..., F], contiguous."""
    x = x.contiguous()
    width = x.shape[-1] // 2
    rows = x.numel() // (2 * width)
    out = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    gate_rows[(triton.cdiv(rows, ROWS), triton.cdiv(width, WIDTH))](x, out, rows, width, ROWS=ROWS, WIDTH=WIDTH)
    return out


def gate_backward(x: Tensor, dout: Tensor) -> Tensor:
    """The gradient of x [..., 2 F], contiguous, from that of the output [..., F]."""
    x, dout = x.contiguous(), dout.contiguous()
    width = dout.shape[-1]
    rows = dout.numel() // width
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs = triton.cdiv(rows, ROWS), triton.cdiv(width, WIDTH)
    gate_rows_backward[programs](x, dout, dx, rows, width, ROWS=ROWS, WIDTH=WIDTH)
    return dx
