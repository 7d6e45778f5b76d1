"""Routed attention through a boolean mask, for benchmarks that train on short sequences.

The recall benchmark trains on batches of up to 64 sequences of 32 to 256 tokens. The product's own masked path takes
one sequence after the other, to save memory; one product for the whole batch takes a half to a tenth of its time
there (CPU). Same routes, same result; the benchmark and the tests compare them.

Legend: B batch, H query heads, G key/value heads, S tokens, D head size, N query blocks, R regions, T slots of a
route.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def route_mask(index_BGNT: Tensor, *, num_tokens: int, region_size: int, query_block_size: int) -> Tensor:
    """index [B, G, N, T] of a causal route, -1 = empty -> bool [B, G, S, S]: may this token see that one?"""
    num_regions = num_tokens // region_size
    # One column more takes the empty slots.
    routed_BGNR = torch.zeros(*index_BGNT.shape[:3], num_regions + 1, dtype=torch.bool, device=index_BGNT.device)
    routed_BGNR.scatter_(3, index_BGNT.masked_fill(index_BGNT < 0, num_regions), True)
    mask_BGSS = routed_BGNR[..., :-1].repeat_interleave(query_block_size, 2).repeat_interleave(region_size, 3)
    return mask_BGSS & torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=index_BGNT.device).tril()


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, *, region_size: int, query_block_size: int
) -> Tensor:
    """Causal `bi_level_attention`: q [B, H, S, D], k, v [B, G, S, D], index [B, G, N, T] -> [B, H, S, D]."""
    mask_BGSS = route_mask(index, num_tokens=q.shape[2], region_size=region_size, query_block_size=query_block_size)
    heads_per_group = q.shape[1] // k.shape[1]
    mask_BHSS = mask_BGSS.repeat_interleave(heads_per_group, 1)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask_BHSS, enable_gqa=heads_per_group > 1)
