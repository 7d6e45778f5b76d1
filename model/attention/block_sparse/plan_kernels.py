"""Kernels that make the plan of a route: a counting sort of its pairs by region, and the shared regions of tiles.

A group is up to 32 query blocks (whole tiles): the blocks that chose a region are the bits of one word. The blocks of
a group name a region at most once each, so a program sets all bits of a group at once (an integer "or", exact in any
order), reads the words back, and knows for each pair how many pairs of the same region come before it in the group.
A program takes some groups one after the other and counts each region's pairs in a row of its own; sums over those
rows give every pair one place, that of a stable sort.

Shapes: Z = B * G key/value heads of all sequences, N query blocks, K slots of a route, R regions, T tiles of a
sequence, W regions that a tile may share, P programs of a segment. A segment is a run of query blocks of one head.
The reference is `plan_reference.py`.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

# A byte tells of a pair of query block and region: its place among the pairs of its region in its group, and whether
LAST = tl.constexpr(32)  # it is the last of them
SCATTERED = tl.constexpr(64)  # it is attended region by region; else it is the first of its tile's pairs of a region
EMPTY = tl.constexpr(-1)  # the slot names no region
FOLLOWS = tl.constexpr(-2)  # the tile shares the region, and this pair is not sorted
# What is sorted: nothing, scattered pairs, or those and the shared regions of tiles, by region and then kind.
NONE, APART, ALL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def number_of_bits(word):
    """Bits set in each uint32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return ((word + (word >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def bits_below(place):
    """Word with all bits before `place`, which is 0 to 31."""
    return (tl.full(place.shape, 1, tl.uint32) << place.to(tl.uint32)) - 1


@triton.jit
def sorted_together(word, shared, TILE: tl.constexpr, TILES: tl.constexpr, SHARED_FROM: tl.constexpr):
    """Of the blocks that chose a region, `word`: the first of each tile that shares it, or the scattered ones."""
    sorted_bits = word & 0
    for other in tl.static_range(TILES):
        bits = (word >> (other * TILE)) & ((1 << TILE) - 1)
        enough = number_of_bits(bits) >= SHARED_FROM
        chosen = tl.where(shared, tl.where(enough, bits ^ (bits & (bits - 1)), 0), tl.where(enough, 0, bits))
        sorted_bits = sorted_bits | (chosen << (other * TILE))
    return sorted_bits


@triton.jit(do_not_specialize=["chunks"])
def plan_groups(
    route_ptr, seen_ptr, table_ptr, listed_ptr, members_ptr, counts_ptr, flags_ptr, chunks, blocks, all_blocks,
    all_tiles, regions, programs,
    SLOTS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr, LISTED: tl.constexpr,
    SHARED_FROM: tl.constexpr, SORTED: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Some groups of a segment: what their tiles share, what is known of each pair, and how often a region is sorted.

    route int32 [Z, N, K]; seen int32 [segments, P, R] and table int32 [segments, P, R * kinds], zeros (seen is left
    so); listed, members and counts as in `TilePlan`; flags int8 [Z, N, K].
    """
    program, segment = tl.program_id(0), tl.program_id(1)
    head = segment // chunks
    first_block = (segment % chunks) * blocks
    kinds: tl.constexpr = 2 if SORTED == ALL else 1
    own_row = (segment.to(tl.int64) * programs + program) * regions
    seen_ptr += own_row
    table_ptr += own_row * kinds
    tile = tl.arange(0, ROWS)[:, None]
    within = tl.arange(0, PAIRS)[None, :]
    in_tile = within // SLOTS
    block = tile * TILE + in_tile
    # Places beyond a group take part in nothing; no shift may reach 32 there all the same.
    member, shift = tl.minimum(block, 31), tl.minimum(tile * TILE, 31).to(tl.uint32)
    in_tile = tl.minimum(in_tile, 31)
    tile_mask: tl.constexpr = (1 << TILE) - 1
    end = tl.minimum(blocks, all_blocks - first_block)  # the last segment of a sequence may be shorter
    first = program * (GROUPS * TILES * TILE)
    for local in range(first, tl.minimum(end, first + GROUPS * TILES * TILE), TILES * TILE):
        valid = (tile < TILES) & (within < TILE * SLOTS) & (local + block < end)
        at = (head.to(tl.int64) * all_blocks + first_block + local) * SLOTS + tile * (TILE * SLOTS) + within
        region = tl.load(route_ptr + at, mask=valid, other=-1)
        real = valid & (region >= 0)
        region = tl.where(real, region, 0)
        if TILE == 1 and SORTED == NONE:  # a block is a tile of its own and names a region once
            word = tl.where(real, bits_below(member) + 1, 0)
        else:
            bit = (bits_below(member) + 1).to(tl.int32, bitcast=True)
            tl.atomic_or(seen_ptr + region, bit, mask=real, sem="relaxed")
            tl.debug_barrier()  # other threads set bits of the same words
            word = tl.load(seen_ptr + region, mask=real, other=0, cache_modifier=".cg").to(tl.uint32, bitcast=True)
            tl.debug_barrier()
            tl.store(seen_ptr + region, tl.zeros([ROWS, PAIRS], tl.int32), mask=real)
        of_tile = (word >> shift) & tile_mask
        shared = real & (number_of_bits(of_tile) >= SHARED_FROM)
        leads = shared & ((of_tile & bits_below(in_tile)) == 0)  # the first block of the tile that chose the region
        place = tl.cumsum(leads.to(tl.int32), 1) - 1
        all_tile = head.to(tl.int64) * all_tiles + (first_block + local) // TILE + tile
        tl.store(listed_ptr + all_tile * LISTED + place, region, mask=leads)
        if TILE > 1:
            tl.store(members_ptr + all_tile * LISTED + place, of_tile.to(tl.int32, bitcast=True), mask=leads)
        number = tl.sum(leads.to(tl.int32), 1)[:, None]
        tl.store(counts_ptr + all_tile, number, mask=(tile < TILES) & (local + tile * TILE < end))
        if SORTED != NONE:
            scattered = real & (shared == 0)
            counted, key = scattered, region * kinds + kinds - 1
            if SORTED == ALL:
                counted = scattered | leads
                key -= leads.to(tl.int32)
            sorted_bits = sorted_together(word, shared, TILE, TILES, SHARED_FROM)
            rank = number_of_bits(sorted_bits & bits_below(member))
            last = counted & ((sorted_bits >> member.to(tl.uint32)) == 1)
            flag = rank + last.to(tl.int32) * LAST + scattered.to(tl.int32) * SCATTERED
            flag = tl.where(counted, flag, tl.where(real, FOLLOWS, EMPTY))
            tl.store(flags_ptr + at, flag.to(tl.int8), mask=valid)
            before = tl.load(table_ptr + key, mask=last, other=0, cache_modifier=".cg")
            tl.store(table_ptr + key, before + rank + 1, mask=last)
        tl.debug_barrier()  # the next group uses the same rows


@triton.jit
def visits_of_key(table_ptr, key, real, row, keys, programs, REGIONS: tl.constexpr, PROGRAMS: tl.constexpr):
    """Sums over all programs of a segment: int32 [REGIONS]."""
    total = tl.zeros([REGIONS], tl.int32)
    for program in range(0, programs, PROGRAMS):
        some = (program + row < programs) & real[None, :]
        total += tl.sum(tl.load(table_ptr + (program + row) * keys + key[None, :], mask=some, other=0), 0)
    return total


@triton.jit(do_not_specialize=["most_units"])
def place_regions(
    table_ptr, start_ptr, unit_region_ptr, unit_first_ptr, extra_first_ptr, regions, programs, most_units,
    UNIT: tl.constexpr, TILE_UNIT: tl.constexpr, KINDS: tl.constexpr, REGIONS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """A segment: where each region's visits begin, and those of each program among them; its units.

    table int32 [segments, P, R * KINDS]: numbers of visits, which become their first places; the others as in
    `Visits`.
    """
    segment = tl.program_id(0).to(tl.int64)
    table_ptr += segment * programs * regions * KINDS
    start_ptr += segment * (regions * KINDS + 1)
    unit_first_ptr += segment * (regions + 1)
    extra_first_ptr += segment * (regions + 1)
    unit_region_ptr += segment * most_units
    pairs = tl.full([], 0, tl.int32)
    units = tl.full([], 0, tl.int32)
    extras = tl.full([], 0, tl.int32)
    inside = tl.arange(0, REGIONS)
    row = tl.arange(0, PROGRAMS)[:, None]
    for first in range(0, regions, REGIONS):
        region = first + inside
        real = region < regions
        of_tiles = tl.zeros([REGIONS], tl.int32)
        total = visits_of_key(table_ptr, region * KINDS + KINDS - 1, real, row, regions * KINDS, programs, REGIONS,
                              PROGRAMS)  # fmt: skip
        number = (total + UNIT - 1) // UNIT
        if KINDS == 2:
            of_tiles = visits_of_key(table_ptr, region * 2, real, row, regions * 2, programs, REGIONS, PROGRAMS)
            number = tl.maximum(number, (of_tiles + TILE_UNIT - 1) // TILE_UNIT)
            total += of_tiles
        begin = pairs + tl.cumsum(total, 0) - total
        extra = tl.maximum(number - 1, 0)
        first_unit = units + tl.cumsum(number, 0) - number
        tl.store(start_ptr + region * KINDS, begin, mask=real)
        if KINDS == 2:
            tl.store(start_ptr + region * 2 + 1, begin + of_tiles, mask=real)
        tl.store(unit_first_ptr + region, first_unit, mask=real)
        tl.store(extra_first_ptr + region, extras + tl.cumsum(extra, 0) - extra, mask=real)
        for unit in range(0, tl.max(number, 0)):
            tl.store(unit_region_ptr + first_unit + unit, region, mask=unit < number)
        pairs += tl.sum(total, 0)
        units += tl.sum(number, 0)
        extras += tl.sum(extra, 0)
        tl.debug_barrier()  # all have read what is written now
        for kind in tl.static_range(KINDS):
            for program in range(0, programs, PROGRAMS):
                some = (program + row < programs) & real[None, :]
                at = ((program + row) * regions + region[None, :]) * KINDS + kind
                one = tl.load(table_ptr + at, mask=some, other=0)
                tl.store(table_ptr + at, begin[None, :] + tl.cumsum(one, 0) - one, mask=some)
                begin += tl.sum(one, 0)
    tl.store(start_ptr + regions * KINDS, pairs)
    tl.store(unit_first_ptr + regions, units)
    tl.store(extra_first_ptr + regions, extras)
    for unit in range(units, most_units, REGIONS):
        tl.store(unit_region_ptr + unit + inside, tl.zeros([REGIONS], tl.int32) + regions,
                 mask=unit + inside < most_units)  # fmt: skip


@triton.jit(do_not_specialize=["chunks"])
def sort_pairs(
    route_ptr, flags_ptr, table_ptr, order_ptr, chunks, blocks, all_blocks, regions, programs,
    SLOTS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr, LISTED: tl.constexpr,
    SORTED: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The groups of `plan_groups` again: each visit goes to its place; order int32 [segments, n * K]."""
    program, segment = tl.program_id(0), tl.program_id(1)
    head = segment // chunks
    first_block = (segment % chunks) * blocks
    kinds: tl.constexpr = 2 if SORTED == ALL else 1
    group: tl.constexpr = TILES * TILE
    table_ptr += (segment.to(tl.int64) * programs + program) * regions * kinds
    order_ptr += segment.to(tl.int64) * blocks * SLOTS
    tile = tl.arange(0, ROWS)[:, None]
    of_tile = tl.arange(0, PAIRS)[None, :]
    within = tile * (TILE * SLOTS) + of_tile
    end = tl.minimum(blocks, all_blocks - first_block)
    first = program * (GROUPS * group)
    for local in range(first, tl.minimum(end, first + GROUPS * group), group):
        valid = (tile < TILES) & (of_tile < TILE * SLOTS) & (local + within // SLOTS < end)
        at = (head.to(tl.int64) * all_blocks + first_block + local) * SLOTS + within
        flag = tl.load(flags_ptr + at, mask=valid, other=-1).to(tl.int32)
        counted = flag >= 0
        region = tl.load(route_ptr + at, mask=counted, other=0)
        key, visit = region * kinds + kinds - 1, local * SLOTS + within
        if SORTED == ALL:
            leads = (counted & (flag < SCATTERED)).to(tl.int32)
            key -= leads
            # The leading pairs of a tile come in the order of its list.
            listed = (local // TILE + tile) * LISTED + tl.cumsum(leads, 1) - 1
            visit = tl.where(leads != 0, listed, visit)
        place = tl.load(table_ptr + key, mask=counted, other=0, cache_modifier=".cg") + (flag & 31)
        tl.store(order_ptr + place, visit, mask=counted)
        tl.debug_barrier()  # all have read where their regions begin
        tl.store(table_ptr + key, place + 1, mask=counted & ((flag & LAST) != 0))
        tl.debug_barrier()
