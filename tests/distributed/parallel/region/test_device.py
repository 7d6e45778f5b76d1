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
REGIONS = 8  # of a sequence


def passed(shard: RegionShard, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Output and gradients of a routed layer's exchange."""
    rule = RouteRule(region_size=8, query_block_size=1, topk=4, causal=causal)
    descriptors = shard.all_key_descriptors(key_descriptors(k, rule.region_size), 0)
    route = route_query_blocks(q, descriptors, rule, first_token=shard.first_token)
    grid = RegionGrid(rule.region_size, rule.query_block_size, causal, 0.25)
    out = shard.routed_attention(q, k + shard.key_before(k, 0), v, route, grid, 0)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))]


def exchange_job(way: Any, batch: int, causal: bool, groups: int) -> tuple[dict[str, int], dict[str, int], int]:
    device = emulated_device.activate()
    layout = RegionLayout(REGIONS, 8, dist.get_world_size())
    generator = torch.Generator().manual_seed(dist.get_rank())
    tensors = [
        torch.randn(batch, heads, layout.tokens_per_rank, 16, generator=generator, requires_grad=True)
        for heads in (4, groups, groups)
    ]
    expected = passed(RegionShard(layout, Transport(dist.group.WORLD), way), causal, *tensors)
    with Emulation():
        shard = RegionShard(layout, Transport(dist.group.WORLD), way)
        on_device = [to_device(x) for x in tensors]
        COUNTS.clear()
        found = passed(shard, causal, *on_device)
        counted = dict(COUNTS.waits), dict(COUNTS.copies), COUNTS.launches.total()
    assert all(x.device == device for x in found)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.inner, other, rtol=1e-5, atol=1e-4)
    return counted


@pytest.mark.parametrize(
    ("way", "batch", "causal", "number"),
    [
        ("fetch", 1, True, 4),
        ("ship", 1, True, 2),
        ("auto", 2, True, 2),
        ("auto", 1, False, 2),
        ("fetch", 2, False, 4),
    ],
)
def test_the_host_waits_twice(ranks: Ranks, way: str, batch: int, causal: bool, number: int) -> None:
    """In both directions together: for the sizes of its own requests, and for those of the others."""
    for waits, copies, _ in ranks(number).run(exchange_job, way, batch, causal, 2):
        assert {name.rpartition(":")[0]: times for name, times in waits.items()} == {
            "tolist parallel/region/plan.py": 1,
            "tolist parallel/region/transport.py": 1,
        }
        assert copies == {}


def test_what_was_fetched_takes_as_many_launches_for_any_number_of_heads(ranks: Ranks) -> None:
    few, more = (
        [launches for *_, launches in ranks(2).run(exchange_job, "fetch", 1, True, groups)] for groups in (2, 4)
    )
    assert more == few
