"""Level two on CUDA: compiled FlexAttention with a `BlockMask` made from the route.

FlexAttention's blocks are larger than regions may be, so the mask lists every block that holds a routed region and
`mask_mod` looks up the exact regions inside. Uncompiled FlexAttention ignores the listed blocks; on the CPU the
compiled one has neither backward nor log-sum-exp. No speed is claimed for this path: it has not run on a GPU.

Legend: B batch, H query heads, G key/value heads, S tokens, D head size, R regions, Nq query blocks, F blocks of
FlexAttention along queries or keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from biroute.model.attention.partial import RegionGrid

# The block size that FlexAttention's kernels are tuned for.
BLOCK_SIZE = 128


def route_block_mask(
    index: Tensor, *, num_heads: int, num_tokens: int, region_size: int, query_block_size: int, causal: bool
) -> BlockMask:
    """index int64 [B, G, Nq, topk], -1 = empty -> the BlockMask of B sequences and `num_heads` query heads."""
    batch, groups, num_blocks, _ = index.shape
    num_regions = num_tokens // region_size
    rep = num_heads // groups
    # One more column takes the empty slots.
    routed_BGNR = index.new_zeros(batch, groups, num_blocks, num_regions + 1, dtype=torch.bool)
    routed_BGNR.scatter_(3, index.masked_fill(index < 0, num_regions), True)
    routed_BGNR = routed_BGNR[..., :num_regions].contiguous()

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        routed = routed_BGNR[b, h // rep, query // query_block_size, key // region_size]
        return routed & (query >= key) if causal else routed

    block_size = BLOCK_SIZE if num_tokens % BLOCK_SIZE == 0 else region_size
    blocks_BGFF = _any_routed(routed_BGNR, num_tokens, block_size)
    if causal:
        blocks_BGFF &= torch.ones_like(blocks_BGFF[0, 0]).tril()
    blocks_BHFF = blocks_BGFF.repeat_interleave(rep, dim=1)
    counts = blocks_BHFF.sum(-1, dtype=torch.int32)
    listed = blocks_BHFF.int().argsort(dim=-1, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(
        counts, listed, BLOCK_SIZE=block_size, mask_mod=sees, seq_lengths=(num_tokens, num_tokens)
    )


def _any_routed(routed_BGNR: Tensor, num_tokens: int, block_size: int) -> Tensor:
    """Which pairs of FlexAttention blocks hold a routed pair: bool [B, G, F, F]."""
    batch, groups, num_blocks, num_regions = routed_BGNR.shape
    flex_blocks = num_tokens // block_size
    blocks_BGFF = routed_BGNR.new_zeros(batch, groups, flex_blocks, flex_blocks)
    b, g, i, j = routed_BGNR.nonzero().unbind(1)
    query_tokens, key_tokens = num_tokens // num_blocks, num_tokens // num_regions
    # First and last FlexAttention block that a query block or a region reaches into, and all between them.
    for query_part in range(-(-query_tokens // block_size) + 1):
        for key_part in range(-(-key_tokens // block_size) + 1):
            query = (i * query_tokens + query_part * block_size).minimum((i + 1) * query_tokens - 1)
            key = (j * key_tokens + key_part * block_size).minimum((j + 1) * key_tokens - 1)
            blocks_BGFF[b, g, query // block_size, key // block_size] = True
    return blocks_BGFF


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def flex_bi_level_attention(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, grid: RegionGrid, *, return_lse: bool = False
) -> Any:
    """q [B, H, S, D], k, v [B, G, S, D], index [B, G, S // Lq, topk] -> out [B, H, S, D]; with `return_lse` also the
    fp32 log-sum-exp [B, H, S], which compiled FlexAttention does not give on the CPU (NotImplementedError there)."""
    mask = route_block_mask(
        index,
        num_heads=q.shape[1],
        num_tokens=q.shape[2],
        region_size=grid.region_size,
        query_block_size=grid.query_block_size,
        causal=grid.causal,
    )
    options = {"block_mask": mask, "scale": grid.scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if not return_lse:
        return _compiled()(q, k, v, **options)
    out, aux = _compiled()(q, k, v, **options, return_aux=AuxRequest(lse=True))
    return out, aux.lse
