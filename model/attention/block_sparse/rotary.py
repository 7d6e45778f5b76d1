"""Rotary embedding in one kernel: reads each query or key once and writes it once, sums in fp32.

The reference is `rope.py`; a row's bits depend on its own elements and position alone.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32


@triton.jit
def rotate_rows(
    x_ptr, cosines_ptr, sines_ptr, out_ptr, heads, tokens, x_b, x_h, x_s, out_b, out_h, out_s, direction,
    HALF: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """x [B, H, S, 2 HALF] -> out, of any strides but the last; cosines and sines [S, HALF]."""
    row, plane = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    i = tl.arange(0, WIDTH)
    inside = (row < tokens)[:, None] & (i < HALF)[None, :]
    # A plane may lie beyond 2^31 elements, and so may a row of one where all heads of a token lie side by side.
    batch, head, token = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64), row.to(tl.int64)[:, None]
    at = x_ptr + batch * x_b + head * x_h + token * x_s + i[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    angle = row[:, None] * HALF + i[None, :]
    cosine = tl.load(cosines_ptr + angle, mask=inside, other=0.0)
    sine = tl.load(sines_ptr + angle, mask=inside, other=0.0) * direction
    to = out_ptr + batch * out_b + head * out_h + token * out_s + i[None, :]
    kind = out_ptr.dtype.element_ty
    tl.store(to, (first * cosine - second * sine).to(kind), mask=inside)
    tl.store(to + HALF, (second * cosine + first * sine).to(kind), mask=inside)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor, direction: float, *, by_token: bool = False) -> Tensor:
    """Rotate by the angles, or by their negatives with `direction` -1.

    Args:
        x: [B, H, S, D].
        cosines: fp32 [S, D / 2].
        sines: fp32 [S, D / 2].
        direction: 1 or -1.
        by_token: whether the heads of a token, and the sequences of a batch, lie side by side in the result.

    Returns:
        [B, H, S, D] in x's dtype, contiguous, or [S, B, H, D] in memory.
    """
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, heads, tokens, size = x.shape
    if by_token:
        out = torch.empty(tokens, batch, heads, size, dtype=x.dtype, device=x.device).permute(1, 2, 0, 3)
    else:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rotate_rows[(triton.cdiv(tokens, ROWS), batch * heads)](
        x, cosines.contiguous(), sines.contiguous(), out, heads, tokens, *x.stride()[:3], *out.stride()[:3],
        direction, HALF=size // 2, WIDTH=triton.next_power_of_2(size // 2), ROWS=ROWS,
    )  # fmt: skip
    return out
