"""The fused router in Triton's interpreter against the router of plain torch: the same route, ties included."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from biroute.model.attention.block_sparse.router import BLOCKS, finalists, fused_route, stretches
from biroute.model.attention.routing import key_descriptors, query_descriptors, route_query_blocks
from biroute.model.attention.rule import MOST_REGIONS_OF_KERNEL, RouteRule

CAUSAL = RouteRule(region_size=16, query_block_size=1, topk=4, causal=True)
RULES = {
    "causal": CAUSAL,
    "several descriptors and a sink": replace(CAUSAL, descriptors_per_region=4, attention_sink=True),
    "nothing forced but the own region": replace(CAUSAL, force_previous=False, topk=2),
    "bidirectional blocks": RouteRule(16, 16, 3, False, force_own=False, force_previous=False),
    "bidirectional, more slots than regions": RouteRule(16, 4, 20, False),
}


def both(q: Tensor, k: Tensor, rule: RouteRule, first_token: int = 0) -> tuple[Tensor, Tensor]:
    keys = key_descriptors(k, rule.region_size, rule.descriptors_per_region)
    q = q[:, :, first_token:]
    queries = query_descriptors(q, k.shape[1], rule.query_block_size, rule.causal)
    found = fused_route(queries, keys, rule, first_token=first_token, precision="ieee")
    return found, route_query_blocks(q, keys, rule, first_token=first_token)


@pytest.mark.parametrize("name", RULES)
def test_the_route_is_that_of_plain_torch(name: str) -> None:
    q, k = torch.randn(2, 4, 112, 24), torch.randn(2, 2, 112, 24)
    found, expected = both(q, k, RULES[name])
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("causal", "whole_numbers"), [(True, False), (False, False), (True, True)])
def test_finalists_of_wide_rows_give_the_same_route(causal: bool, whole_numbers: bool) -> None:
    """Whole numbers: more regions are equal than there are places for finalists, so that whole rows are compared."""
    rule = RouteRule(1, 1, 4, causal, force_previous=False)
    assert finalists(rule.topk, 256) == 16
    q, k = torch.randn(1, 1, 256, 16), torch.randn(1, 1, 256, 16)
    if whole_numbers:
        q, k = q.sign() * (torch.arange(16) < 2), k.sign() * (torch.arange(16) < 2)
    found, expected = both(q, k, rule)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("causal", [True, False])
def test_ties_go_to_the_lower_region(causal: bool) -> None:
    """Small whole numbers: most affinities are equal, and exact in any order of summation."""
    rule = replace(CAUSAL, causal=causal, force_previous=False)
    q = torch.randint(-1, 2, (1, 1, 128, 16)).float()
    k = torch.randint(-1, 2, (1, 1, 8, 1, 16)).float().expand(-1, -1, -1, 16, -1).reshape(1, 1, 128, 16)
    found, expected = both(q, k, rule)
    assert torch.equal(found, expected)


def test_zeros_of_both_signs_are_equal() -> None:
    q = torch.tensor([1.0, -1.0]).repeat(32)[None, None, :, None].expand(1, 1, 64, 16).contiguous()
    found, expected = both(q, torch.zeros(1, 1, 64, 16), replace(CAUSAL, force_previous=False, topk=2))
    assert torch.equal(found, expected)
    assert found[0, 0, 63].tolist() == [0, 3]


def test_a_shard_and_a_single_token_choose_like_the_whole() -> None:
    q, k = torch.randn(1, 2, 96, 24), torch.randn(1, 1, 96, 24)
    whole, _ = both(q, k, CAUSAL)
    shard, _ = both(q, k, CAUSAL, first_token=48)
    assert torch.equal(shard, whole[:, :, 48:])
    last, _ = both(q, k, CAUSAL, first_token=95)
    assert torch.equal(last, whole[:, :, 95:])


def test_half_precision_rounds_the_descriptors() -> None:
    queries, keys = torch.randn(1, 1, 64, 32), torch.randn(1, 1, 4, 32)
    rule = replace(CAUSAL, topk=2, force_previous=False)
    found = fused_route(queries, keys, rule, dtype=torch.float16)
    rounded = fused_route(queries.half().float(), keys.half().float(), rule, precision="ieee")
    assert torch.equal(found, rounded)


def test_stretches_cover_every_tile_once_and_reach_every_region() -> None:
    rule = RouteRule(64, 1, 32, True)
    found = stretches(131_072, 0, 2048, rule)
    assert [first for first, _, _ in found] == [
        0,
        *torch.tensor([n for _, n, _ in found]).cumsum(0)[:-1].tolist(),
    ]
    assert sum(tiles for _, tiles, _ in found) * BLOCKS == 131_072
    assert [columns for _, _, columns in found] == [64, 128, 256, 512, 1024, 2048]


def test_too_many_regions_are_refused() -> None:
    keys = torch.empty(1, 1, MOST_REGIONS_OF_KERNEL + 1, 8, device="meta")
    with pytest.raises(ValueError, match="at most 16384"):
        fused_route(torch.empty(1, 1, 1, 8, device="meta"), keys, CAUSAL)
