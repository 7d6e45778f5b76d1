"""The exchange between region ranks on an emulated device: nothing mixes devices, and waits of the host are few."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import emulated_device
from helpers.emulated_device import COUNTS, Emulation, to_device
from helpers.pool import WorkerPool
from torch import Tensor

from biroute.model.attention.grid import RegionGrid
from biroute.model.attention.routing import key_descriptors, route_query_blocks
from biroute.model.attention.rule import RouteRule
from biroute.parallel.region.costs import RegionLayout
from biroute.parallel.region.shard import RegionShard
from biroute.parallel.region.transport import Transport

Ranks = Callable[[int], WorkerPool]
RULE = RouteRule(region_size=8, query_block_size=1, topk=4, causal=True)
REGIONS = 8  # of a sequence


def passed(shard: RegionShard, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Output and gradients of a routed layer's exchange."""
    descriptors = shard.all_key_descriptors(key_descriptors(k, RULE.region_size), 0)
    route = route_query_blocks(q, descriptors, RULE, first_token=shard.first_token)
    grid = RegionGrid(RULE.region_size, RULE.query_block_size, RULE.causal, 0.25)
    out = shard.routed_attention(q, k + shard.key_before(k, 0), v, route, grid, 0)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))]


def exchange_job(way: Any, batch: int) -> tuple[dict[str, int], dict[str, int]]:
    device = emulated_device.activate()
    layout = RegionLayout(REGIONS, RULE.region_size, dist.get_world_size())
    generator = torch.Generator().manual_seed(dist.get_rank())
    tensors = [
        torch.randn(batch, heads, layout.tokens_per_rank, 16, generator=generator, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    expected = passed(RegionShard(layout, Transport(dist.group.WORLD), way), *tensors)
    with Emulation():
        shard = RegionShard(layout, Transport(dist.group.WORLD), way)
        on_device = [to_device(x) for x in tensors]
        COUNTS.clear()
        found = passed(shard, *on_device)
        counted = dict(COUNTS.waits), dict(COUNTS.copies)
    assert all(x.device == device for x in found)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.inner, other, rtol=1e-5, atol=1e-4)
    return counted


@pytest.mark.parametrize(("way", "batch"), [("fetch", 1), ("ship", 1), ("auto", 2)])
def test_the_host_waits_twice(ranks: Ranks, way: str, batch: int) -> None:
    """In both directions together: for the sizes of its own requests, and for those of the others."""
    for waits, copies in ranks(2).run(exchange_job, way, batch):
        assert {name.rpartition(":")[0]: times for name, times in waits.items()} == {
            "tolist parallel/region/plan.py": 1,
            "tolist parallel/region/transport.py": 1,
        }
        assert copies == {}
