"""What a path computes, from sizes: the same as the tiles that are really cut from a route."""

from __future__ import annotations

import pytest
import torch

from biroute.model.attention.grid import RegionGrid
from biroute.model.attention.partial import _plan, _setting
from biroute.model.attention.paths import tiled_pairs
from biroute.model.attention.routing import route_regions
from biroute.model.attention.rule import RouteRule

TOKENS, HEADS, GROUPS, SIZE = 1024, 4, 2, 16


@pytest.mark.parametrize(
    ("region_size", "query_block_size", "topk", "tolerance"),
    [(64, 64, 6, 0.0), (32, 32, 2, 0.0), (32, 32, 8, 0.0), (16, 1, 8, 0.1), (32, 4, 12, 0.1)],
)
def test_tiles_hold_the_pairs_that_are_predicted(
    region_size: int, query_block_size: int, topk: int, tolerance: float
) -> None:
    """Exact for tiles of a query block; where a tile is a region's visitors, the last one is half full on average."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, TOKENS, SIZE, generator=generator) for heads in (HEADS, GROUPS))
    route = route_regions(q, k, RouteRule(region_size, query_block_size, topk, True))
    setting = _setting(RegionGrid(region_size, query_block_size, True, 1.0), q, k, route, q)
    computed = copied = 0
    for group in range(GROUPS):
        cut = _plan(route[0, group], k[0, group], setting)
        assert cut.band is not None
        computed += HEADS // GROUPS * region_size * (TOKENS * cut.band.width - region_size * (cut.band.width - 1))
        for tiles in cut.tiles:
            rows = HEADS // GROUPS * tiles.blocks.numel() * query_block_size
            computed += rows * tiles.regions.shape[1] * region_size
            by_region = tiles.padding is not None
            copied += rows if by_region else tiles.regions.numel() * region_size
    found = tiled_pairs(
        regions=(0, TOKENS // region_size), region_size=region_size, query_block_size=query_block_size,
        heads=HEADS // GROUPS, topk=topk, causal=True,
    )  # fmt: skip
    assert found.pairs * HEADS == pytest.approx(computed, rel=tolerance)
    assert found.gathered * HEADS == pytest.approx(copied, rel=tolerance)
