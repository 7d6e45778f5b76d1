"""Routed attention of short sequences: PyTorch's own attention under a mask of the routed tokens.

Up to about a thousand tokens, many small products of gathered regions take longer than a few whole products of which
the masked part is thrown away. One key/value head of one sequence is computed at a time, for some query rows at a
time, and backward builds the mask again. So it needs no more memory than dense attention.

Shapes: B sequences, H query heads, G key/value heads, r query heads of a key/value head, S tokens (of a chunk: its
queries, or the keys that they may see), D head size, R regions, N query blocks, K slots of a route.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from biroute.model.attention.grid import RegionGrid
from biroute.model.attention.partial import accumulator, store
from biroute.model.attention.paths import CHUNK_TOKENS

HEADS_AT_ONCE = 2  # query heads that backward processes together

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class MaskedAttention(torch.autograd.Function):
    """Attention of q [B, H, S, D] to k, v [B, G, S, D] over route [B, G, N, K]; gives [B, H, S, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, route: Tensor, grid: RegionGrid) -> Tensor:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for b, g, heads in _groups(q, k):
            for part in _chunks(route[b, g], q, grid):
                at = (slice(b, b + 1), heads, part.rows)
                q_1rSD = q[at]
                k_1rSD, v_1rSD = (_for_heads(x[b, g, : part.keys], q_1rSD) for x in (k, v))
                out[at], lse[at] = _forward(q_1rSD, k_1rSD, v_1rSD, attn_mask=part.mask_SS, scale=grid.scale)
        _clear_unrouted(out, route, grid)
        ctx.save_for_backward(q, k, v, route, out, lse)
        ctx.grid = grid
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, route, out, lse = ctx.saved_tensors
        grid = ctx.grid
        if (route < 0).all(-1).any():
            dout = _clear_unrouted(dout.clone(), route, grid)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for b, g, heads in _groups(q, k):
            # At least fp32: in bf16, sums over chunks and over the query heads would lose precision.
            grads = (dk[b, g], dv[b, g])
            sums = [accumulator(x) for x in grads]
            for part in _chunks(route[b, g], q, grid):
                # Only a few heads at once, because each one has gradients for all keys.
                for first in range(heads.start, heads.stop, HEADS_AT_ONCE):
                    at = (slice(b, b + 1), slice(first, min(first + HEADS_AT_ONCE, heads.stop)), part.rows)
                    k_1rSD, v_1rSD = (_for_heads(x[b, g, : part.keys], q[at]) for x in (k, v))
                    dq[at], *of_heads = _backward(
                        dout[at], q[at], k_1rSD, v_1rSD, out[at], lse[at], 0.0, False,
                        attn_mask=part.mask_SS, scale=grid.scale,
                    )  # fmt: skip
                    for total_SD, x_1rSD in zip(sums, of_heads, strict=True):
                        total_SD[: part.keys] += x_1rSD[0].sum(0, dtype=lse.dtype)
                    del of_heads, x_1rSD  # before the next ones are made
            for total_SD, x_SD in zip(sums, grads, strict=True):
                store(total_SD, x_SD)
        return dq, dk, dv, None, None


class _Chunk(NamedTuple):
    rows: slice  # of the query tokens
    keys: int  # the first so many keys, all that these rows may see
    mask_SS: Tensor  # noqa: N815  [queries, keys], additive: 0 where the query sees the key, else -inf


def _chunks(route_NK: Tensor, q: Tensor, grid: RegionGrid) -> Iterator[_Chunk]:
    """Cut the queries of one key/value head into runs of whole regions, and make the mask of each."""
    num_tokens, size = q.shape[2], grid.region_size
    step = size * -(-CHUNK_TOKENS // size)
    num_regions = num_tokens // size
    # An additional column receives the empty slots.
    routed_NR = torch.zeros(route_NK.shape[0], num_regions + 1, dtype=torch.bool, device=q.device)
    routed_NR.scatter_(1, route_NK.masked_fill(route_NK < 0, num_regions), True)
    for first in range(0, num_tokens, step):
        last = min(first + step, num_tokens)
        keys = last if grid.causal else num_tokens
        blocks = slice(first // grid.query_block_size, last // grid.query_block_size)
        visible_SR = routed_NR[blocks, : keys // size].repeat_interleave(grid.query_block_size, 0)
        visible_SS = visible_SR.repeat_interleave(size, 1)
        if grid.causal:
            visible_SS.tril_(first)
        visible_SS |= ~visible_SR.any(1, keepdim=True)  # avoids NaN; these rows are set to 0 afterwards
        mask_SS = torch.zeros((), dtype=q.dtype, device=q.device).where(visible_SS, float("-inf"))
        yield _Chunk(slice(first, last), keys, mask_SS)


def _groups(q: Tensor, k: Tensor) -> Iterator[tuple[int, int, slice]]:
    """Yield (sequence, key/value head, its query heads) for all key/value heads of all sequences."""
    rep = q.shape[1] // k.shape[1]
    for b, g in product(range(k.shape[0]), range(k.shape[1])):
        yield b, g, slice(g * rep, (g + 1) * rep)


def _for_heads(x_SD: Tensor, q_1rSD: Tensor) -> Tensor:
    """Expand keys or values to the query heads that share them, without a copy: [S, D] -> [1, r, S, D]."""
    return x_SD.expand(1, q_1rSD.shape[1], -1, -1)


def _clear_unrouted(x: Tensor, route: Tensor, grid: RegionGrid) -> Tensor:
    """Set the rows of x [B, H, S, D] whose query has no route to 0, in place, and return x."""
    unrouted_BGN = (route < 0).all(-1)
    if unrouted_BGN.any():
        rows_BGS = unrouted_BGN.repeat_interleave(grid.query_block_size, 2)
        x.masked_fill_(rows_BGS.repeat_interleave(x.shape[1] // route.shape[1], 1)[..., None], 0.0)
    return x
