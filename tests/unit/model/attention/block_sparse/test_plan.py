"""The cut of a route into shared regions, scattered pairs and units, against loops."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from biroute.model.attention.block_sparse.plan import Blocking, cut_segments, invert, plan_tiles


def random_routes(heads: int, blocks: int, regions: int, slots: int) -> Tensor:
    route = torch.full((heads, blocks, slots), -1, dtype=torch.int32)
    for z in range(heads):
        for n in range(blocks):
            # Low numbers are likelier, so that neighbours share some regions and not others.
            likely = torch.distributions.Exponential(1.0 / (1.0 + torch.arange(regions))).sample().argsort()
            chosen = likely[: int(torch.randint(0, slots + 1, ()))].sort().values
            route[z, n, : len(chosen)] = chosen
    return route


@pytest.mark.parametrize(("heads", "blocks", "block"), [(4, 45, 1), (1, 70, 1), (3, 40, 2), (2, 9, 32)])
def test_shared_regions_and_scattered_pairs_against_loops(heads: int, blocks: int, block: int) -> None:
    regions, slots = 11, 4
    sizes = Blocking.of(heads=heads, block=block, region=16, head_size=32)
    route = random_routes(3, blocks, regions, slots)
    plan = plan_tiles(route, regions, sizes)
    assert plan.scattered.is_contiguous()  # kernels read it as such, also where the last tile is not full
    for z in range(3):
        for tile in range(-(-blocks // sizes.tile)):
            rows = range(tile * sizes.tile, min(blocks, (tile + 1) * sizes.tile))
            count = Counter(region for n in rows for region in route[z, n].tolist() if region >= 0)
            shared = sorted(region for region, times in count.items() if times >= sizes.shared_from)
            number = int(plan.counts[z, tile])
            assert plan.listed[z, tile, :number].tolist() == shared
            for region, members in zip(shared, plan.members[z, tile].tolist(), strict=False):
                chose = {n - rows[0] for n in rows if region in route[z, n].tolist()}
                assert {i for i in range(32) if members >> i & 1} == chose
            for n in rows:
                expected = [region >= 0 and region not in shared for region in route[z, n].tolist()]
                assert plan.scattered[z, n].tolist() == expected


def test_the_plan_does_not_depend_on_how_many_heads_are_sorted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Blocking.of(heads=4, block=1, region=16, head_size=32)
    route = random_routes(3, 20, 7, 3)
    whole, visits = plan_tiles(route, 7, sizes), invert(route.flatten(1).where(route.flatten(1) >= 0, 7), 7, 4)
    monkeypatch.setattr("biroute.model.attention.block_sparse.plan.PAIRS_AT_ONCE", 1)
    one_by_one = plan_tiles(route, 7, sizes)
    assert torch.equal(whole.scattered, one_by_one.scattered)
    assert torch.equal(whole.counts, one_by_one.counts)
    again = invert(route.flatten(1).where(route.flatten(1) >= 0, 7), 7, 4)
    assert torch.equal(visits.order, again.order)
    assert torch.equal(visits.start, again.start)


def test_visits_and_units_against_loops() -> None:
    regions, unit = 5, 4
    region = torch.randint(0, regions + 1, (3, 40))
    visits = invert(region, regions, unit)
    for segment in range(3):
        units, extra = [], 0
        for r in range(regions):
            mine = (region[segment] == r).nonzero().flatten().tolist()
            begin, end = visits.start[segment, r : r + 2].tolist()
            assert visits.order[segment, begin:end].tolist() == mine
            assert visits.unit_first[segment, r] == len(units)
            assert visits.extra_first[segment, r] == extra
            units += [r] * -(-len(mine) // unit)
            extra += max(0, -(-len(mine) // unit) - 1)
        assert visits.unit_region[segment, : len(units)].tolist() == units
        assert (visits.unit_region[segment, len(units) :] == regions).all()
        assert extra <= visits.num_extra


@pytest.mark.parametrize(
    ("sizes", "tile", "parts", "part", "all_shared"),
    [
        ({"heads": 4, "block": 1, "region": 64, "head_size": 128}, 16, 1, 64, False),
        ({"heads": 4, "block": 64, "region": 64, "head_size": 128}, 1, 1, 64, True),
        ({"heads": 1, "block": 1, "region": 16, "head_size": 32}, 32, 1, 16, False),
        ({"heads": 3, "block": 4, "region": 48, "head_size": 256}, 5, 2, 24, True),
        ({"heads": 4, "block": 1, "region": 256, "head_size": 128}, 16, 4, 64, False),
    ],
)
def test_sizes_of_tiles_and_parts(sizes: dict[str, int], tile: int, parts: int, part: int, all_shared: bool) -> None:
    found = Blocking.of(**sizes)
    assert (found.tile, found.parts, found.part, found.all_shared) == (tile, parts, part, all_shared)
    assert (parts - 1) * part < sizes["region"] <= parts * part


@pytest.mark.parametrize(
    ("num_heads", "num_blocks", "bytes_per_block", "scratch", "expected"),
    [
        (8, 1000, 0, 512, (1000, 8)),
        (8, 100, 10, 2500, (100, 2)),
        (8, 1000, 10, 2500, (240, 1)),
        (2, 64, 999, 10, (16, 1)),
    ],
)
def test_segments_fit_into_the_scratch_memory(
    num_heads: int, num_blocks: int, bytes_per_block: int, scratch: int, expected: tuple[int, int]
) -> None:
    assert cut_segments(num_heads, num_blocks, bytes_per_block, 16, scratch) == expected
