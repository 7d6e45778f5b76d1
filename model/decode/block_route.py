"""The route of one causal query block: `choose_regions` of training with less to read and fewer operations.

Training's choice goes by affinities that are summed in fp64 and rounded to fp32. To compute all of them for one token
takes longer than anything else of a step behind many regions. Most regions are out of the question, though: products
in fp32, of half the bytes, tell which. How far those can be off is known, and whatever could be among the best is
compared in fp64, so the route is the same.

Shapes: G key/value heads, R regions up to the block's own, n descriptors of a region, D head size, K slots of a
route, m regions that are compared in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from biroute.model.attention.routing import top_regions
from biroute.model.attention.rule import RouteRule

_SCAN_FROM = 128  # regions; below, everything is compared in fp64
_SPARE = 16  # regions that are compared in fp64 beyond the K that a route has


def route_of_block(query_GD: Tensor, keys_nGRD: Tensor, rule: RouteRule, largest_norm: float) -> Tensor:
    """Choose the regions of one block.

    Args:
        query_GD: fp32, the block's `query_descriptors`.
        keys_nGRD: fp32, the regions' `key_descriptors` up to the block's own, whose may be anything finite.
        rule: how regions are chosen: causal, by affinity.
        largest_norm: no descriptor of a region before the own one is longer.

    Returns:
        The route, int64 [1, G, 1, K], ascending, -1 = empty, as `choose_regions` gives it.
    """
    groups, regions = keys_nGRD.shape[1:3]
    if regions <= rule.topk:  # there is nothing to choose
        every = torch.arange(regions, device=query_GD.device)
        return torch.nn.functional.pad(every, (0, rule.topk - regions), value=-1).expand(1, groups, 1, -1)
    if regions >= max(_SCAN_FROM, rule.topk + _SPARE):
        found = _route_by_scan(query_GD, keys_nGRD, rule, largest_norm)
        if found is not None:
            return found[None, :, None]
    score_GR = _affinities(query_GD.double(), keys_nGRD.double()).float()
    return top_regions(_force(score_GR, rule)[None, :, None], rule.topk)


def _route_by_scan(query_GD: Tensor, keys_nGRD: Tensor, rule: RouteRule, largest_norm: float) -> Tensor | None:
    """Return the route [G, K]; None if more regions than expected are too near to one another for fp32."""
    rough_GR = _force(_affinities(query_GD, keys_nGRD), rule)
    value_Gm, region_Gm = rough_GR.topk(rule.topk + _SPARE)
    # A sum of D products in fp32 is off by at most D u |q| |k|, u = 2^-24 (Higham 2002, section 3.1), and rounding
    # the fp64 sum by u |q| |k|. What is lower than the last one chosen by twice that, is lower in fp64 as well.
    size = query_GD.shape[1]
    doubt = 2.1 * (size + 2) * 2.0**-24 * largest_norm * query_GD.norm(dim=1)
    if not bool((value_Gm[:, -1] < value_Gm[:, rule.topk - 1] - doubt).all()):
        return None
    region_Gm = region_Gm.sort(dim=1).values
    index_nGmD = region_Gm[None, :, :, None].expand(keys_nGRD.shape[0], -1, -1, size)
    near_nGmD = keys_nGRD.gather(2, index_nGmD)
    score_Gm = _affinities(query_GD.double(), near_nGmD.double()).float()
    score_Gm.masked_fill_(rough_GR.gather(1, region_Gm) == torch.inf, torch.inf)  # the forced ones
    place_GK = top_regions(score_Gm[None, :, None], rule.topk)[0, :, 0]
    return region_Gm.gather(1, place_GK)


def _affinities(query_GD: Tensor, keys_nGRD: Tensor) -> Tensor:
    """Return [G, R]: the largest product of a query with any of a region's n descriptors."""
    return (query_GD[:, None] @ keys_nGRD.transpose(2, 3)).amax(0)[:, 0]


def _force(score_GR: Tensor, rule: RouteRule) -> Tensor:
    """Put the regions that are always chosen before all others, in place."""
    score_GR[:, -1] = torch.inf
    if rule.force_previous:
        score_GR[:, -2] = torch.inf
    if rule.attention_sink:
        score_GR[:, 0] = torch.inf
    return score_GR
