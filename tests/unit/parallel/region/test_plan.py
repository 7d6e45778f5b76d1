"""The plan of an exchange: against a count by plain loops, and what owners learn of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from biroute.model.attention.routing import select_regions
from biroute.model.attention.rule import RouteRule
from biroute.parallel.region.costs import Baselines, ExchangeCosts, RegionLayout
from biroute.parallel.region.plan import ExchangePlan, Way, plan_exchange
from biroute.parallel.region.transfers import pack_requests, request_lengths, unpack_requests

COSTS = ExchangeCosts.of(region_size=4, query_block_size=1, heads_per_group=2, head_size=8, element_size=4)


def random_route(layout: RegionLayout, topk: int, seed: int) -> torch.Tensor:
    """A causal route of every token of two sequences with two groups, [2, 2, S, topk]."""
    tokens = layout.num_regions * layout.region_size
    affinity = torch.randn(2, 2, tokens, layout.num_regions, generator=torch.Generator().manual_seed(seed))
    own = torch.arange(tokens) // layout.region_size
    return select_regions(affinity, own, RouteRule(layout.region_size, 1, topk, causal=True))


def plans_of(layout: RegionLayout, topk: int, seed: int, way: Way) -> list[ExchangePlan]:
    shards = random_route(layout, topk, seed).chunk(layout.num_ranks, 2)
    return [plan_exchange(shard, layout, rank, COSTS, way) for rank, shard in enumerate(shards)]


@settings(max_examples=30)
@given(st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 4), st.integers(2, 6), st.integers(0, 99))
def test_the_cheaper_way_by_plain_loops(ranks: int, per_rank: int, topk: int, seed: int) -> None:
    layout = RegionLayout(ranks * per_rank, 4, ranks)
    shards = random_route(layout, topk, seed).chunk(ranks, 2)
    for plan in plans_of(layout, topk, seed, "auto"):
        expected = torch.zeros(ranks, dtype=torch.int64)
        for owner in range(ranks):
            for route_NK in shards[plan.rank].flatten(0, 1):
                chosen = [[r for r in row if r >= 0 and r // per_rank == owner] for row in route_NK.tolist()]
                if owner == plan.rank:
                    continue
                fetch = len({region for row in chosen for region in row}) * COSTS.region
                ship = sum(bool(row) for row in chosen) * (COSTS.queries + COSTS.results)
                expected[owner] += min(fetch, ship)
        assert torch.equal(plan.received_bytes() + plan.sent_bytes(), expected)
        bound = Baselines.of(
            layout, plan.rank, COSTS, groups=4, blocks=layout.tokens_per_rank, topk=topk, causal=True
        )
        assert int(expected.sum()) <= bound.bound <= bound.causal_fetch <= bound.ring


@pytest.mark.parametrize("way", ["auto", "fetch", "ship"])
def test_owners_learn_what_is_wanted(way: Way) -> None:
    layout, topk = RegionLayout(12, 4, 4), 5
    plans = plans_of(layout, topk, 0, way)
    packed = [pack_requests(plan.transfers) for plan in plans]
    for owner in range(4):
        header = torch.stack([header[owner] for header, _, _ in packed])
        messages = [message.split(lengths)[owner] for _, message, lengths in packed]
        assert request_lengths(header.tolist(), topk) == [len(message) for message in messages]
        served = unpack_requests(header, header.tolist(), torch.cat(messages), topk)
        transfers = iter(served)
        for plan in plans:
            for number, asked in enumerate(plan.transfers):
                if plan.transfers.sizes[number].peer != owner:
                    continue
                given_ = next(transfers)
                assert (given_.group, given_.ship) == (asked.group, asked.ship)
                requested = plan.transfers.requested_region[asked.requested]
                assert torch.equal(served.requested_region[given_.requested], requested)
                if asked.ship:
                    slots = plan.transfers.pair_slots[asked.pairs]
                    assert torch.equal(served.pair_slots[given_.pairs], slots)
        assert next(transfers, None) is None


def test_slots_name_what_was_chosen() -> None:
    layout = RegionLayout(12, 4, 4)
    route = random_route(layout, 5, 1).chunk(4, 2)[3]
    plan = plan_exchange(route, layout, 3, COSTS)
    found: dict[tuple[int, int], set[int]] = {}
    for number, transfer in enumerate(plan.transfers):
        requested = (
            plan.transfers.requested_region[transfer.requested]
            + plan.transfers.sizes[number].peer * layout.regions_per_rank
        )
        for pair in range(transfer.pairs.start, transfer.pairs.stop):
            slots = plan.transfers.pair_slots[pair]
            key = (transfer.group, int(plan.pair_block[pair]))
            found.setdefault(key, set()).update(requested[slots[slots >= 0]].tolist())
    for group, route_NK in enumerate(route.flatten(0, 1).tolist()):
        for block, row in enumerate(route_NK):
            assert found.get((group, block), set()) == {r for r in row if 0 <= r < 9}


def test_ranks_must_divide_the_regions() -> None:
    with pytest.raises(ValueError, match="5 ranks do not divide the 12 regions"):
        RegionLayout(12, 4, 5)


def test_regions_are_fetched_where_both_ways_cost_the_same() -> None:
    """Region 0 is chosen by as many blocks as make shipping as dear as fetching it, then by one fewer."""
    layout = RegionLayout(4, 4, 2)
    costs = ExchangeCosts(region=60, queries=10, results=10)
    for blocks, ship in ((3, False), (2, True)):
        route = torch.full((1, 1, 8, 2), -1)
        route[0, 0, :, 0] = 3
        route[0, 0, :blocks] = torch.tensor([0, 3])
        plan = plan_exchange(route, layout, 1, costs)
        assert [size.ship for size in plan.transfers.sizes] == [ship], blocks


def test_the_bound_counts_the_ranks_that_a_query_can_reach() -> None:
    """By hand: rank 1 of 4 sees one other rank, so a block ships to one at most, whatever its topk."""
    costs = ExchangeCosts(region=1000, queries=10, results=5)
    layout = RegionLayout(16, 4, 4)
    bound = Baselines.of(layout, 1, costs, groups=2, blocks=16, topk=9, causal=True)
    assert bound == Baselines(causal_fetch=1 * 2 * 4 * 1000, ring=3 * 2 * 4 * 1000, bound=2 * 16 * 1 * 15)
    last = Baselines.of(layout, 3, costs, groups=2, blocks=16, topk=3, causal=True)
    assert last.bound == 2 * 16 * 2 * 15  # three ranks before it, but two regions besides the own one
    both_sides = Baselines.of(layout, 1, costs, groups=2, blocks=16, topk=2, causal=False)
    assert both_sides.bound == 2 * 16 * 2 * 15
    assert Baselines.of(layout, 1, costs, groups=2, blocks=4000, topk=9, causal=True).bound == 8000  # fetching all
