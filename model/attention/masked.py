"""Routed attention of short sequences: PyTorch's own attention under a mask of the routed tokens.

Below about a thousand tokens many small products of gathered regions cost more than a few whole ones whose masked
part is thrown away. One key/value head of one sequence at a time, some query rows at a time, and the mask is built
again in backward: no more memory than dense attention.

Legend: B batch, H query heads, G key/value heads, r heads of a group, S tokens, C query tokens of a chunk, K keys
that they may see, D head size, R regions, N query blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from biroute.model.attention.grid import RegionGrid
from biroute.model.attention.partial import accumulator, store

# Sequences up to this long are always masked, none beyond the second.
MASKED_TOKENS, LARGEST_MASKED_TOKENS = 512, 4096
# Few rows to a route: up to so many tokens for each of its k regions, gathering takes longer than dense attention.
GATHERED_TOKENS = 100
HEADS_AT_ONCE = 2  # in backward
CHUNK_TOKENS = 128  # query tokens at once: enough for the product's full speed, few enough for a small mask

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def prefers_mask(num_tokens: int, region_size: int, rows: int, topk: int) -> bool:
    """The rule of `path="auto"` on the CPU, for routes shared by `rows` query rows (r heads of Lq tokens).

    Short sequences; routes that cover half of the sequence; routes of fewer rows than a region has keys if they have
    many regions, each of which is gathered by itself.
    """
    if num_tokens <= MASKED_TOKENS:
        return True
    wide = num_tokens <= 2 * topk * region_size
    scattered = rows < region_size and num_tokens <= GATHERED_TOKENS * topk
    return (wide or scattered) and num_tokens <= LARGEST_MASKED_TOKENS


class MaskedAttention(torch.autograd.Function):
    """(q [B, H, S, D], k, v [B, G, S, D], index [B, G, N, topk], grid) -> out [B, H, S, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, index: Tensor, grid: RegionGrid) -> Tensor:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for b, g, heads in _groups(q, k):
            for part in _chunks(index[b, g], q, grid):
                at = (slice(b, b + 1), heads, part.rows)
                q_1rCD = q[at]
                k_1rKD, v_1rKD = (_for_heads(x[b, g, : part.keys], q_1rCD) for x in (k, v))
                out[at], lse[at] = _forward(q_1rCD, k_1rKD, v_1rKD, attn_mask=part.mask_CK, scale=grid.scale)
        _clear_routeless(out, index, grid)
        ctx.save_for_backward(q, k, v, index, out, lse)
        ctx.grid = grid
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, index, out, lse = ctx.saved_tensors
        grid = ctx.grid
        if (index < 0).all(-1).any():
            dout = _clear_routeless(dout.clone(), index, grid)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for b, g, heads in _groups(q, k):
            # fp32 and more: sums over chunks and over the heads of a group would drift in bf16.
            grads = (dk[b, g], dv[b, g])
            sums = [accumulator(x) for x in grads]
            for part in _chunks(index[b, g], q, grid):
                # A few heads at once: each has gradients of its own for all the keys.
                for first in range(heads.start, heads.stop, HEADS_AT_ONCE):
                    at = (slice(b, b + 1), slice(first, min(first + HEADS_AT_ONCE, heads.stop)), part.rows)
                    k_1rKD, v_1rKD = (_for_heads(x[b, g, : part.keys], q[at]) for x in (k, v))
                    dq[at], *of_heads = _backward(
                        dout[at], q[at], k_1rKD, v_1rKD, out[at], lse[at], 0.0, False,
                        attn_mask=part.mask_CK, scale=grid.scale,
                    )  # fmt: skip
                    for total_SD, x_1rKD in zip(sums, of_heads, strict=True):
                        total_SD[: part.keys] += x_1rKD[0].sum(0, dtype=lse.dtype)
                    del of_heads, x_1rKD  # before the next ones are made
            for total_SD, x_SD in zip(sums, grads, strict=True):
                store(total_SD, x_SD)
        return dq, dk, dv, None, None


class _Chunk(NamedTuple):
    rows: slice  # of the query tokens
    keys: int  # the first so many keys, all that these rows may see
    mask_CK: Tensor  # noqa: N815  additive: 0 where row c sees key k, else -inf


def _chunks(index_NT: Tensor, q: Tensor, grid: RegionGrid) -> Iterator[_Chunk]:
    """The route of one key/value head, cut into runs of whole regions."""
    num_tokens, size = q.shape[2], grid.region_size
    step = size * -(-CHUNK_TOKENS // size)
    num_regions = num_tokens // size
    # One region more takes the empty slots.
    routed_NR = torch.zeros(index_NT.shape[0], num_regions + 1, dtype=torch.bool, device=q.device)
    routed_NR.scatter_(1, index_NT.masked_fill(index_NT < 0, num_regions), True)
    for first in range(0, num_tokens, step):
        last = min(first + step, num_tokens)
        keys = last if grid.causal else num_tokens
        blocks = slice(first // grid.query_block_size, last // grid.query_block_size)
        visible_CR = routed_NR[blocks, : keys // size].repeat_interleave(grid.query_block_size, 0)
        visible_CK = visible_CR.repeat_interleave(size, 1)
        if grid.causal:
            visible_CK.tril_(first)
        visible_CK |= ~visible_CR.any(1, keepdim=True)  # softmax needs something; such rows are cleared afterwards
        mask_CK = torch.zeros((), dtype=q.dtype, device=q.device).where(visible_CK, float("-inf"))
        yield _Chunk(slice(first, last), keys, mask_CK)


def _groups(q: Tensor, k: Tensor) -> Iterator[tuple[int, int, slice]]:
    """(sequence, key/value head, its query heads) of every pair."""
    rep = q.shape[1] // k.shape[1]
    for b, g in product(range(k.shape[0]), range(k.shape[1])):
        yield b, g, slice(g * rep, (g + 1) * rep)


def _for_heads(x_KD: Tensor, q_1rCD: Tensor) -> Tensor:
    """Keys or values of a group, shared by its query heads without a copy: [K, D] -> [1, r, K, D]."""
    return x_KD.expand(1, q_1rCD.shape[1], -1, -1)


def _clear_routeless(x: Tensor, index: Tensor, grid: RegionGrid) -> Tensor:
    """`x` [B, H, S, D] with the rows of queries without a route set to 0, in place."""
    routeless_BGN = (index < 0).all(-1)
    if routeless_BGN.any():
        rows_BGS = routeless_BGN.repeat_interleave(grid.query_block_size, 2)
        x.masked_fill_(rows_BGS.repeat_interleave(x.shape[1] // index.shape[1], 1)[..., None], 0.0)
    return x
