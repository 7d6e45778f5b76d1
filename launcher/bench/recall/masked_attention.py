"""Routed attention with a boolean mask, for benchmarks that train on short sequences.

The recall benchmark trains on batches of up to 64 sequences of 32 to 256 tokens. The model's own masked path
processes one sequence at a time to save memory. On a CPU, processing the whole batch together takes a half to a tenth
of its time. The results are the same, which the benchmark and the tests check.

Legend: B batch, H query heads, G key/value heads, S tokens, D head size, N query blocks, R regions, K slots of a
route.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def route_mask(route_BGNK: Tensor, *, num_tokens: int, region_size: int, query_block_size: int) -> Tensor:
    """Convert a causal route [B, G, N, K], -1 for empty slots, to a mask bool [B, G, S, S], True where allowed."""
    num_regions = num_tokens // region_size
    # An additional column receives the empty slots.
    routed_BGNR = torch.zeros(*route_BGNK.shape[:3], num_regions + 1, dtype=torch.bool, device=route_BGNK.device)
    routed_BGNR.scatter_(3, route_BGNK.masked_fill(route_BGNK < 0, num_regions), True)
    mask_BGSS = routed_BGNR[..., :-1].repeat_interleave(query_block_size, 2).repeat_interleave(region_size, 3)
    return mask_BGSS & torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=route_BGNK.device).tril()


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, route: Tensor, *, region_size: int, query_block_size: int
) -> Tensor:
    """Compute causal `bi_level_attention`: q [B, H, S, D], k, v [B, G, S, D], route [B, G, N, K] -> [B, H, S, D]."""
    mask_BGSS = route_mask(route, num_tokens=q.shape[2], region_size=region_size, query_block_size=query_block_size)
    heads_per_group = q.shape[1] // k.shape[1]
    mask_BHSS = mask_BGSS.repeat_interleave(heads_per_group, 1)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask_BHSS, enable_gqa=heads_per_group > 1)
