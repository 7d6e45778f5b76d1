"""The cut of a route into shared regions, scattered pairs and units, against loops."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from biroute.model.attention.block_sparse import attention
from biroute.model.attention.block_sparse.attention import Call
from biroute.model.attention.block_sparse.plan import Blocking, Sorted, cut_segments, make_plan
from biroute.model.attention.block_sparse.plan_reference import reference_plan
from biroute.model.attention.grid import RegionGrid


def random_routes(heads: int, blocks: int, regions: int, slots: int) -> Tensor:
    route = torch.full((heads, blocks, slots), -1, dtype=torch.int32)
    for z in range(heads):
        for n in range(blocks):
            # Low numbers are likelier, so that neighbours share some regions and not others.
            likely = torch.distributions.Exponential(1.0 / (1.0 + torch.arange(regions))).sample().argsort()
            chosen = likely[: int(torch.randint(0, slots + 1, ()))].sort().values
            route[z, n, torch.randperm(slots)[: len(chosen)]] = chosen.int()  # empty slots anywhere
    return route


# Heads, query blocks, tokens of a block, query blocks of a segment: tiles of 16, 32, 10, 1, 8 and 4 blocks.
SIZES = [(8, 45, 1, 45), (8, 45, 1, 32), (1, 70, 1, 64), (3, 40, 4, 20), (2, 9, 32, 2), (2, 9, 32, 9),
         (1, 75, 16, 75), (32, 50, 1, 8)]  # fmt: skip
REGIONS, SLOTS, UNIT = 11, 4, 4


def blocking(heads: int, block: int) -> Blocking:
    return Blocking.of(heads=heads, block=block, region=max(16, block), head_size=32)


@pytest.mark.parametrize(("heads", "blocks", "block", "segment"), SIZES)
def test_shared_regions_and_scattered_pairs_against_loops(heads: int, blocks: int, block: int, segment: int) -> None:
    sizes = blocking(heads, block)
    route = random_routes(3, blocks, REGIONS, SLOTS)
    plan, _ = make_plan(route, REGIONS, sizes, blocks=segment, unit_size=UNIT, which="all")
    for z in range(3):
        for tile in range(-(-blocks // sizes.tile)):
            rows = range(tile * sizes.tile, min(blocks, (tile + 1) * sizes.tile))
            count = Counter(region for n in rows for region in route[z, n].tolist() if region >= 0)
            shared = [region for region, times in count.items() if times >= sizes.shared_from]  # as they first appear
            number = int(plan.counts[z, tile])
            assert plan.listed[z, tile, :number].tolist() == shared
            for region, members in zip(shared, plan.members[z, tile].tolist(), strict=False):
                chose = {n - rows[0] for n in rows if region in route[z, n].tolist()}
                assert sizes.tile == 1 or {i for i in range(32) if members >> i & 1} == chose
            for n in rows:
                expected = [region >= 0 and region not in shared for region in route[z, n].tolist()]
                assert plan.scattered[z, n].tolist() == expected


@pytest.mark.parametrize("which", ["scattered", "all"])
def test_visits_and_units_against_loops(which: Sorted) -> None:
    sizes, segment, blocks = blocking(8, 1), 64, 90  # a program takes two groups of the first segment
    route = random_routes(2, blocks, REGIONS, SLOTS)
    unit = 8 if which == "all" else UNIT
    plan, visits = make_plan(route, REGIONS, sizes.turned(), blocks=segment, unit_size=unit, which=which)
    assert visits is not None
    assert visits.tile_unit == 1
    kept = torch.where(plan.scattered, route, REGIONS)
    width = plan.listed.shape[2]
    for number in range(4):
        head, first = number // 2, number % 2 * segment
        region = kept[head, first : first + segment].flatten()
        first //= sizes.tile
        tiles = range(first, min(plan.counts.shape[1], first + segment // sizes.tile))
        places = [(t, i) for t in tiles for i in range(int(plan.counts[head, t]))]
        units, extra = [], 0
        for r in range(REGIONS):
            mine = (region == r).nonzero().flatten().tolist()
            sharing = [(t - first) * width + i for t, i in places if plan.listed[head, t, i] == r]
            if which == "all":
                begin, middle, end = visits.start[number, 2 * r : 2 * r + 3].tolist()
                assert visits.order[number, begin:middle].tolist() == sharing
            else:
                middle, end = visits.start[number, r : r + 2].tolist()
                sharing = []
            assert visits.order[number, middle:end].tolist() == mine
            assert visits.unit_first[number, r] == len(units)
            assert visits.extra_first[number, r] == extra
            needed = max(-(-len(mine) // unit), len(sharing))
            units += [r] * needed
            extra += max(0, needed - 1)
        assert visits.extra_first[number, REGIONS] == extra
        assert visits.unit_region[number, : len(units)].tolist() == units
        assert (visits.unit_region[number, len(units) :] == REGIONS).all()
        assert extra <= visits.num_extra


@pytest.mark.parametrize(("heads", "blocks", "block", "segment"), SIZES)
def test_the_plan_is_the_reference(
    heads: int, blocks: int, block: int, segment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("biroute.model.attention.block_sparse.plan.LEAST_GROUPS", 1)  # several programs
    monkeypatch.setattr("biroute.model.attention.block_sparse.plan.PAIRS_PER_COUNTER", 4)
    monkeypatch.setattr("biroute.model.attention.block_sparse.plan.REGIONS_AT_ONCE", 4)
    monkeypatch.setattr("biroute.model.attention.block_sparse.plan.COUNTERS_AT_ONCE", 2)
    sizes = blocking(heads, block)
    route = random_routes(2, blocks, REGIONS, SLOTS)
    for which in ("none", "scattered", "all"):
        cut = {"blocks": segment, "unit_size": UNIT, "which": which}
        (plan, visits), (expected, others) = (f(route, REGIONS, sizes, **cut) for f in (make_plan, reference_plan))
        assert torch.equal(plan.flags, expected.flags)
        assert torch.equal(plan.counts, expected.counts)
        counts = torch.arange(plan.listed.shape[2]) < plan.counts[..., None]
        assert torch.equal(plan.listed[counts], expected.listed[counts])
        assert sizes.tile == 1 or torch.equal(plan.members[counts], expected.members[counts])
        assert (visits is None) == (others is None) == (which == "none")
        if visits is not None and others is not None:
            for name in ("start", "unit_region", "unit_first", "extra_first"):
                assert torch.equal(getattr(visits, name), getattr(others, name)), name
            sorted_ = torch.arange(visits.order.shape[1]) < visits.start[:, -1:]
            assert torch.equal(visits.order[sorted_], others.order[sorted_])


@pytest.mark.parametrize(
    ("sizes", "tile", "parts", "part", "all_shared"),
    [
        ({"heads": 4, "block": 1, "region": 64, "head_size": 128}, 32, 1, 64, False),
        ({"heads": 4, "block": 64, "region": 64, "head_size": 128}, 1, 1, 64, True),
        ({"heads": 1, "block": 1, "region": 16, "head_size": 32}, 32, 1, 16, False),
        ({"heads": 8, "block": 4, "region": 48, "head_size": 256}, 4, 2, 24, True),
        ({"heads": 4, "block": 16, "region": 64, "head_size": 128}, 1, 1, 64, True),
        ({"heads": 4, "block": 1, "region": 256, "head_size": 128}, 32, 4, 64, False),
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


@pytest.mark.parametrize(
    ("tokens", "key_tokens", "expected"),
    [
        (8_192, 8_192, 260),
        (16_384, 16_384, 192),
        (65_536, 65_536, 384),
        (262_144, 262_144, 768),
        (16_384, 114_688, 224),
    ],
)
def test_scratch_memory_of_a_layer(tokens: int, key_tokens: int, expected: int) -> None:
    """In MiB: a head at once if that is no more than 264, three quarters of the queries, or the keys of a rank."""
    q = torch.empty(1, 32, tokens, 128, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, 8, key_tokens, 128, dtype=torch.bfloat16, device="meta")
    route = torch.empty(1, 8, tokens, 32, dtype=torch.int32, device="meta")
    call = Call.of(q, k, k, route, RegionGrid(64, 1, True, 0.1)).turned()
    assert call.scratch == expected << 20


@pytest.mark.parametrize(("tokens", "head_size", "of_forward"), [(8_192, 128, 260), (16_384, 64, 264)])
def test_the_results_of_one_head_are_one_segment(
    tokens: int, head_size: int, of_forward: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 MiB each way, and in forward their log-sum-exps; of keys there are too many for forward to share all."""
    monkeypatch.setattr(attention, "make_plan", lambda *_, **__: (None, None))
    q = torch.empty(1, 32, tokens, head_size, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, 8, 32_768, head_size, dtype=torch.bfloat16, device="meta")
    route = torch.empty(1, 8, tokens, 32, dtype=torch.int32, device="meta")
    call = Call.of(q, k, k, route, RegionGrid(64, 1, True, 0.1))
    for launches, expected in ((call.forward_launches(), of_forward), (call.turned().backward_launches(), 256)):
        all_of_them = list(launches)
        assert [(one.blocks, one.segments, one.chunks) for one in all_of_them] == [(tokens, 1, 1)] * 8
        assert all_of_them[0].part.nbytes + all_of_them[0].part_lse.nbytes == expected << 20
