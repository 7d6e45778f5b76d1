"""Descriptors in one kernel: each key or query is read once, sums are fp64 and rounded once.

The reference is `routing.py`, which says what descriptors are.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16


@triton.jit
def mean_rows(
    x_ptr, out_ptr, rows, groups, stride_b, stride_h, stride_s, largest,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """x [B, G * HEADS, S, D] of any strides but the last -> out [B, G, rows, D].

    A row is the mean over the heads of a group and TOKENS tokens, those from row * STEP on; no number becomes 0.
    """
    row, plane = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    d = tl.arange(0, DIM)
    inside = (row < rows)[:, None] & (d < D)[None, :]
    head = (plane // groups).to(tl.int64) * stride_b + (plane % groups).to(tl.int64) * HEADS * stride_h
    at = x_ptr + head + (row.to(tl.int64) * STEP * stride_s)[:, None] + d[None, :]
    total = tl.zeros([ROWS, DIM], tl.float64)
    for _ in range(HEADS):
        token = at
        for _ in range(TOKENS):
            total += tl.load(token, mask=inside, other=0.0).to(tl.float64)
            token += stride_s
        at += stride_h  # the planes of a group may lie more than 2^31 elements apart
    mean = (total / (HEADS * TOKENS)).to(tl.float32)
    mean = tl.where(mean == mean, mean, 0.0)
    mean = tl.minimum(tl.maximum(mean, -largest), largest)
    to = out_ptr + (plane.to(tl.int64) * rows + row)[:, None] * D + d[None, :]
    tl.store(to, mean.to(out_ptr.dtype.element_ty), mask=inside)


def mean_descriptors(
    x: Tensor, groups: int, tokens: int, step: int, *, largest: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Average the heads of each group and runs of tokens.

    Args:
        x: [B, H, S, D].
        groups: G, which divides H.
        tokens: of a run.
        step: tokens from the beginning of a run to that of the next one; divides S.
        largest: the means are clamped to it.
        dtype: of the result, rounded from fp32.

    Returns:
        [B, G, S // step, D].
    """
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, heads, num_tokens, size = x.shape
    rows = num_tokens // step
    out = torch.empty(batch, groups, rows, size, dtype=dtype, device=x.device)
    mean_rows[(triton.cdiv(rows, ROWS), batch * groups)](
        x, out, rows, groups, *x.stride()[:3], largest,
        HEADS=heads // groups, TOKENS=tokens, STEP=step, D=size, DIM=triton.next_power_of_2(size), ROWS=ROWS,
    )  # fmt: skip
    return out
