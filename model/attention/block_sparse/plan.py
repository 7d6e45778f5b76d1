"""How the kernels cut a route: what neighbouring queries share, what is scattered, and who visits each region.

A tile is a few neighbouring query blocks. A region that enough of a tile's blocks chose is *shared*: the tile attends
it once, as one dense product under a mask of its members. The other (query block, region) pairs are *scattered*: they
are sorted by region, so that a region's keys and values are loaded once and its visitors are streamed past them.
A block with many query rows is a tile of its own, and then everything is shared.

Everything here has a size that shapes alone decide, so that the host never waits for the device.

Shapes: Z = B * G key/value heads of all sequences, N query blocks, K slots of a route, R regions, T tiles of a
sequence, W regions that a tile may share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import triton
from torch import Tensor

from biroute.model.attention.block_sparse import plan_kernels

# Query rows of a tile: as many as one product of the tensor cores takes without spilling registers. The wider a tile,
# the more of it one read of a region's keys and values serves; a block of half as many rows is a tile of its own.
ROWS_OF_TILE = 128
# A region is shared by a tile if at least these fractions of the tile's blocks chose it, forward and backward. A
# shared region costs two whole products (backward: seven); a scattered pair costs its queries (and upstream
# gradients), gathered, and a partial result, written and read again. By counted work 6 and 14 pairs of 32 cost about
# as much as a shared region (docs/gpu.md).
SHARED_FORWARD, SHARED_BACKWARD = 3 / 16, 7 / 16
# Blocks of so many rows share every region: there are few in a tile, and nothing need be sorted.
ROWS_OF_SHARED = 16
# Elements of a region's keys that a program holds on chip; a larger region is cut into parts.
KEYS_ON_CHIP = 64 * 128
# Query blocks of a group: the bits of a word.
BITS = 32
# A program of the plan takes at least so many groups, and so many pairs for each region: its row of counters is then
# small beside what it counts.
LEAST_GROUPS, PAIRS_PER_COUNTER = 4, 8
# Regions, and rows of counters, that are summed at once.
REGIONS_AT_ONCE, COUNTERS_AT_ONCE = 1024, 8
WARPS = 8

# What is sorted by region: nothing, scattered pairs, or those and the shared regions of tiles.
Sorted = Literal["none", "scattered", "all"]
_SORTED: dict[Sorted, int] = {"none": 0, "scattered": 1, "all": 2}  # how many kinds are sorted; the kernels' SORTED


@dataclass(frozen=True)
class Blocking:
    """Sizes of tiles and parts, decided by shapes alone."""

    heads: int  # r, query heads of a key/value head
    block: int  # Lq, tokens of a query block
    region: int  # L, tokens of a region
    tile: int  # query blocks of a tile
    shared_from: int  # blocks of a tile that must choose a region for it to be shared
    parts: int  # parts of a region
    part: int  # tokens of a part; the last one may have fewer

    @staticmethod
    def of(*, heads: int, block: int, region: int, head_size: int) -> Blocking:
        """The sizes for a layer."""
        rows = heads * block
        # 32: the members of a tile are the bits of an int32.
        tile = 1 if 2 * rows >= ROWS_OF_TILE else min(32, ROWS_OF_TILE // rows)
        parts = min(region, -(-region * head_size // KEYS_ON_CHIP))
        return Blocking(
            heads=heads,
            block=block,
            region=region,
            tile=tile,
            shared_from=1 if rows >= ROWS_OF_SHARED else max(1, round(tile * SHARED_FORWARD)),
            parts=parts,
            part=-(-region // parts),
        )

    def turned(self) -> Blocking:
        """The sizes for backward."""
        if self.rows >= ROWS_OF_SHARED:
            return self
        return replace(self, shared_from=max(1, round(self.tile * SHARED_BACKWARD)))

    @property
    def rows(self) -> int:
        """Query rows of a block, over the heads."""
        return self.heads * self.block

    def listed(self, slots: int, num_regions: int) -> int:
        """W, the most regions that a tile shares."""
        return min(self.tile * slots // self.shared_from, num_regions)

    @property
    def all_shared(self) -> bool:
        """Whether every pair is shared, whatever the route."""
        return self.shared_from == 1


@dataclass(frozen=True)
class TilePlan:
    """The shared regions of each tile, and what is known of each pair of a route."""

    listed: Tensor  # int32 [Z, T, W]: the shared regions of a tile, the earliest block's first
    members: Tensor  # int32 [Z, T, W]: bit i: block i of the tile chose the region; unset where tiles are blocks
    counts: Tensor  # int32 [Z, T]: how many of a tile's W places count
    flags: Tensor  # int8 [Z, N, K]: see `plan_kernels.py`; unset where no pair is sorted

    @property
    def scattered(self) -> Tensor:
        """Whether a pair is attended region by region; bool [Z, N, K]."""
        return self.flags >= plan_kernels.SCATTERED.value


@dataclass(frozen=True)
class Visits:
    """What visits each region in a segment (a run of query blocks of one key/value head), cut into units.

    A unit is what one program streams past one region: at most `tile_unit` tiles that share it (backward only), and
    at most `unit_size` scattered pairs. A region has as many units as the larger of both needs.
    """

    order: Tensor  # int32 [segments, n * K]: region after region the tiles (local tile * W + place in its list), then
    # the pairs (local block * K + slot); the rest is unset
    start: Tensor  # int32 [segments, kinds * R + 1]: where the visits of a region and kind (tiles, pairs) begin
    unit_region: Tensor  # int32 [segments, units]: the region of each unit; R = no unit
    unit_first: Tensor  # int32 [segments, R + 1]: the first unit of each region
    extra_first: Tensor  # int32 [segments, R + 1]: the same, not counting the first unit of any region
    kinds: int  # 2 with tiles, 1 with pairs alone
    unit_size: int
    tile_unit: int
    num_extra: int  # most units of a segment that are not the first one of a region

    @staticmethod
    def empty(
        route: Tensor, segments: int, pairs: int, num_regions: int, unit_size: int, which: Sorted, sizes: Blocking
    ) -> Visits:
        """Memory for the visits of `pairs` pairs of each segment, beside the route."""
        kinds = _SORTED[which]
        tile_unit = tiles_of_unit(unit_size, sizes)
        extra = pairs // pairs_of_unit(unit_size, sizes)

        def memory(size: int) -> Tensor:
            return route.new_empty(segments, size)

        units, edges = extra + min(num_regions, pairs), num_regions + 1
        places = memory(pairs), memory(kinds * num_regions + 1), memory(units), memory(edges), memory(edges)
        return Visits(*places, kinds, unit_size, tile_unit, extra)


def tiles_of_unit(unit_size: int, sizes: Blocking) -> int:
    """Most tiles of a unit of `unit_size` pairs: a tile that shares a region stands for `shared_from` or more."""
    return max(1, unit_size // sizes.shared_from)


def pairs_of_unit(unit_size: int, sizes: Blocking) -> int:
    """Fewest pairs of a full unit."""
    return min(unit_size, tiles_of_unit(unit_size, sizes) * sizes.shared_from)


def make_plan(
    route: Tensor, num_regions: int, sizes: Blocking, *, blocks: int, unit_size: int, which: Sorted
) -> tuple[TilePlan, Visits | None]:
    """Find the regions that the blocks of a tile share, and sort pairs by region.

    Visits of one region stay in the order of the route, so a plan is the same whatever program made which part of it.

    Args:
        route: int32 [Z, N, K] of regions, -1 = empty (anywhere); a block names a region once.
        num_regions: R.
        sizes: how blocks form tiles.
        blocks: query blocks of a segment: whole tiles, or N.
        unit_size: most pairs of a unit.
        which: what to sort; "none" gives no visits.
    """
    heads, num_blocks, slots = route.shape
    groups, of_program, programs = plan_programs(route, num_regions, sizes, blocks, which)
    chunks, tiles = triton.cdiv(num_blocks, blocks), triton.cdiv(num_blocks, sizes.tile)
    segments = heads * chunks
    width = sizes.listed(slots, num_regions)
    listed = route.new_empty(heads, tiles, width)
    members = listed if sizes.tile == 1 else torch.empty_like(listed)
    counts = route.new_empty(heads, tiles)
    flags = route.new_empty(route.shape if which != "none" else 0, dtype=torch.int8)
    kinds = _SORTED[which]
    counters = route.new_zeros(int(kinds > 0 or sizes.tile > 1) + kinds, segments, programs, num_regions)
    seen, table = (counters[0], counters[1:]) if len(counters) else (route, route)
    shape = chunks, blocks, num_blocks
    tiled = {
        "SLOTS": slots, "TILE": sizes.tile, "TILES": groups, "GROUPS": of_program, "LISTED": width,
        "SORTED": _SORTED[which], "ROWS": triton.next_power_of_2(groups),
        "PAIRS": triton.next_power_of_2(sizes.tile * slots), "num_warps": WARPS,
    }  # fmt: skip
    plan_kernels.plan_groups[(programs, segments)](
        route, seen, table, listed, members, counts, flags, *shape, tiles, num_regions, programs,
        SHARED_FROM=sizes.shared_from, **tiled,
    )  # fmt: skip
    plan = TilePlan(listed, members, counts, flags)
    if which == "none":
        return plan, None
    visits = Visits.empty(route, segments, blocks * slots, num_regions, unit_size, which, sizes)
    plan_kernels.place_regions[(segments,)](
        table, visits.start, visits.unit_region, visits.unit_first, visits.extra_first, num_regions, programs,
        visits.unit_region.shape[1], UNIT=unit_size, TILE_UNIT=visits.tile_unit, KINDS=kinds,
        REGIONS=min(REGIONS_AT_ONCE, triton.next_power_of_2(num_regions)), PROGRAMS=COUNTERS_AT_ONCE, num_warps=WARPS,
    )  # fmt: skip
    plan_kernels.sort_pairs[(programs, segments)](
        route, flags, table, visits.order, *shape, num_regions, programs, **tiled
    )
    return plan, visits


def plan_programs(
    route: Tensor, num_regions: int, sizes: Blocking, blocks: int, which: Sorted
) -> tuple[int, int, int]:
    """Return how the plan is divided: tiles of a group, groups of a program, programs of a segment."""
    tiles = min(BITS // sizes.tile, triton.cdiv(blocks, sizes.tile))
    group = tiles * sizes.tile
    of_program = max(LEAST_GROUPS, triton.cdiv(PAIRS_PER_COUNTER * num_regions, group * route.shape[2]))
    if which == "none" and sizes.tile == 1:
        of_program = 1  # there are no counters
    return tiles, of_program, triton.cdiv(blocks, of_program * group)


def cut_segments(num_heads: int, num_blocks: int, bytes_per_block: int, tile: int, scratch: int) -> tuple[int, int]:
    """Cut the query blocks so that the partial results of one launch fit into the scratch memory.

    Returns:
        Query blocks of a segment (whole tiles of them), and segments of one launch. A launch takes several segments
        only where a segment is a whole sequence.
    """
    if num_blocks * bytes_per_block <= scratch:
        at_once = max(1, min(num_heads, scratch // max(1, num_blocks * bytes_per_block)))
        return num_blocks, at_once
    blocks = max(tile, scratch // bytes_per_block // tile * tile)
    return min(blocks, num_blocks), 1
