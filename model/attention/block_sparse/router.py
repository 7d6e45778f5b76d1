"""The router in one kernel: affinities and top-k, without the affinities of all regions in memory.

A program takes a few query blocks at a time. It writes their affinities into rows of scratch that it owns and uses
again (small enough to stay in the L2 cache), then finds each block's k-th largest one by bisection over the bits of
the floats and writes the chosen regions in ascending order. Ties go to the lower region. The choice of one block
depends on its own query and the keys alone: it is the same in a shard, in a recomputation and in decode.

Shapes: Z = B * G key/value heads of all sequences, N query blocks, R regions, n descriptors of a region, D head size,
K slots of a route. The reference is `select_regions` of `routing.py`.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from biroute.model.attention.rule import MOST_REGIONS_OF_KERNEL, RouteRule

Precision = Literal["ieee", "tf32x3", "bf16x3"]

# Query blocks of one product, each time that the descriptors of all regions are read; and regions of one product.
BLOCKS, REGIONS = 128, 32
# Elements of a row of affinities that one program holds in registers while it selects: 16 for each of its threads.
WARPS = 8
SELECTED_AT_ONCE = 16 * 32 * WARPS
# Neighbouring regions of which the best one is compared first. The k best of these bests bound what can be chosen;
# sixteen bits of them are bound enough.
GROUP, BITS_OF_BOUND = 4, 16
NARROW = 64  # rows below this width are compared as they are; the first blocks of a sequence have such rows
# Programs of a launch: one for each multiprocessor of an H100, so that most of their scratch stays in its L2 cache.
PROGRAMS = 132
_FORCED = tl.constexpr(2147483647)
_EXCLUDED = tl.constexpr(-2147483648)


@triton.jit(do_not_specialize=["first_block", "first_tile"])
def route_blocks(
    queries_ptr, keys_ptr, rows_ptr, route_ptr, first_block, first_tile, tiles, all_blocks, heads, regions, columns,
    SLOTS: tl.constexpr, PLACES: tl.constexpr, DESCRIPTORS: tl.constexpr, BLOCK: tl.constexpr, REGION: tl.constexpr,
    D: tl.constexpr, DIM: tl.constexpr, BLOCKS: tl.constexpr, REGIONS: tl.constexpr, WIDTH: tl.constexpr,
    AT_ONCE: tl.constexpr, FINALISTS: tl.constexpr, GROUP: tl.constexpr, BITS_OF_BOUND: tl.constexpr,
    CAUSAL: tl.constexpr, OWN: tl.constexpr, PREVIOUS: tl.constexpr, SINK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """queries [Z, N, D], keys [n, Z, R, D] -> route int32 [Z, N, K]; rows [programs, BLOCKS, WIDTH] is scratch."""
    rows_ptr += tl.program_id(0).to(tl.int64) * (BLOCKS * WIDTH)
    d = tl.arange(0, DIM)
    for tile in range(tl.program_id(0), tiles * heads, tl.num_programs(0)):
        head = tile // tiles
        block0 = (first_tile + tile % tiles) * BLOCKS
        block = block0 + tl.arange(0, BLOCKS)
        at = (head.to(tl.int64) * all_blocks + block)[:, None] * D + d[None, :]
        query = tl.load(queries_ptr + at, mask=(block < all_blocks)[:, None] & (d < D)[None, :], other=0.0)
        for first in range(0, columns, REGIONS):
            region = first + tl.arange(0, REGIONS)
            inside = (region < regions)[None, :] & (d < D)[:, None]
            best = tl.full([BLOCKS, REGIONS], -float("inf"), tl.float32)
            for i in range(DESCRIPTORS):
                plane = (i * heads + head).to(tl.int64) * regions
                key = tl.load(keys_ptr + (plane + region)[None, :] * D + d[:, None], mask=inside, other=0.0)
                best = tl.maximum(best, tl.dot(query, key, input_precision=PRECISION))
            to = tl.arange(0, BLOCKS)[:, None] * WIDTH + region[None, :]
            tl.store(rows_ptr + to, best, mask=(region < WIDTH)[None, :])
        tl.debug_barrier()  # the rows are read by other threads than wrote them
        for some in range(0, BLOCKS, AT_ONCE):
            select(
                rows_ptr + some * WIDTH, route_ptr, head, block0 + some, first_block, all_blocks, regions, columns,
                SLOTS, PLACES, BLOCK, REGION, WIDTH, AT_ONCE, FINALISTS, GROUP, BITS_OF_BOUND, CAUSAL, OWN, PREVIOUS,
                SINK,
            )  # fmt: skip
        tl.debug_barrier()  # the next tile writes to the same rows


@triton.jit
def select(
    rows_ptr, route_ptr, head, block0, first_block, all_blocks, regions, columns,
    SLOTS: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr, REGION: tl.constexpr, WIDTH: tl.constexpr,
    AT_ONCE: tl.constexpr, FINALISTS: tl.constexpr, GROUP: tl.constexpr, BITS_OF_BOUND: tl.constexpr,
    CAUSAL: tl.constexpr, OWN: tl.constexpr, PREVIOUS: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    """Choose the regions of AT_ONCE query blocks from their rows of affinities."""
    block = block0 + tl.arange(0, AT_ONCE)
    region = tl.arange(0, WIDTH)
    own = ((first_block + block) * BLOCK // REGION)[:, None]
    inside = (region < columns) & (region < regions)
    affinity = tl.load(
        rows_ptr + tl.arange(0, AT_ONCE)[:, None] * WIDTH + region[None, :], mask=inside[None, :], other=0.0
    )
    # Floats in an order of signed integers: equal floats are equal integers (0.0 and -0.0 are made one first).
    bits = (affinity + 0.0).to(tl.int32, bitcast=True)
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    candidate = inside[None, :] & (block < all_blocks)[:, None]
    forced = tl.full([AT_ONCE, WIDTH], False, tl.int1)
    if OWN:
        forced = forced | (region[None, :] == own)
    if PREVIOUS:
        forced = forced | (region[None, :] == own - 1)
    if SINK:
        forced = forced | (region[None, :] == 0)
    allowed = candidate
    if CAUSAL:
        allowed = candidate & ((region[None, :] < own) | forced) & (region[None, :] <= own)
    rank = tl.where(allowed, tl.where(forced, _FORCED, rank), _EXCLUDED)
    number_allowed = tl.minimum(columns, regions) + tl.zeros([AT_ONCE], tl.int32)
    if CAUSAL:  # those before the own one, and that one itself, which every causal rule forces
        number_allowed = tl.minimum((first_block + block) * BLOCK // REGION + 1, number_allowed)
    want = tl.where(block < all_blocks, tl.minimum(number_allowed, SLOTS), 0)
    route_ptr += (head.to(tl.int64) * all_blocks + block0) * SLOTS
    slot = tl.arange(0, PLACES)[None, :]
    empty = (slot >= want[:, None]) & (slot < SLOTS) & (block < all_blocks)[:, None]
    tl.store(route_ptr + tl.arange(0, AT_ONCE)[:, None] * SLOTS + slot, -1, mask=empty)
    regions_of_row = tl.broadcast_to(region[None, :], [AT_ONCE, WIDTH])
    if FINALISTS < WIDTH:
        # `want` groups have a best one that reaches this bound, so all that is chosen does, and lies in these groups.
        best = tl.max(tl.reshape(rank, [AT_ONCE, WIDTH // GROUP, GROUP]), 2)
        few = allowed & (rank >= threshold_of(best, want, BITS_OF_BOUND)[:, None])
        number = tl.sum(few.to(tl.int32), 1)
        if tl.max(number, 0) <= FINALISTS:
            store_finalists(rows_ptr, route_ptr, rank, regions_of_row, few, number, want, SLOTS, AT_ONCE, WIDTH,
                            FINALISTS)  # fmt: skip
        else:  # many are equal, or nearly
            store_chosen(route_ptr, rank, regions_of_row, allowed, want, SLOTS, AT_ONCE, WIDTH)
    else:
        store_chosen(route_ptr, rank, regions_of_row, allowed, want, SLOTS, AT_ONCE, WIDTH)


@triton.jit
def store_finalists(rows_ptr, route_ptr, rank, region, few, number, want, SLOTS: tl.constexpr,
                    AT_ONCE: tl.constexpr, WIDTH: tl.constexpr, FINALISTS: tl.constexpr):  # fmt: skip
    """Move the `number` of `few` in each row to its beginning, in the memory of the rows, and choose among them."""
    at = rows_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + tl.arange(0, AT_ONCE)[:, None] * WIDTH
    place = tl.cumsum(few.to(tl.int32), 1) - 1
    tl.debug_barrier()  # other threads may still read what is overwritten
    tl.store(at + place, rank, mask=few)
    tl.store(at + FINALISTS + place, region, mask=few)
    tl.debug_barrier()
    inside = tl.arange(0, FINALISTS)[None, :]
    real = inside < number[:, None]
    finalist = tl.load(at + inside, mask=real, other=_EXCLUDED)
    finalist_region = tl.load(at + FINALISTS + inside, mask=real, other=0)
    store_chosen(route_ptr, finalist, finalist_region, real, want, SLOTS, AT_ONCE, FINALISTS)


@triton.jit
def threshold_of(rank, want, BITS: tl.constexpr):
    """The largest threshold of so many bits that `want` ranks of each row reach, bit by bit from the sign down."""
    reach = tl.sum((rank >= 0).to(tl.int32), 1)
    threshold = tl.where(reach >= want, 0, _EXCLUDED)
    bit = 30
    while bit >= 32 - BITS:
        trial = threshold + (1 << bit)
        reach = tl.sum((rank >= trial[:, None]).to(tl.int32), 1)
        threshold = tl.where(reach >= want, trial, threshold)
        bit -= 1
    return threshold


@triton.jit
def store_chosen(route_ptr, rank, region, allowed, want, SLOTS: tl.constexpr, AT_ONCE: tl.constexpr,
                 WIDTH: tl.constexpr):  # fmt: skip
    """Write the `want` highest of each row [AT_ONCE, WIDTH] in ascending order; the lower of equal ones."""
    threshold = threshold_of(rank, want, 32)
    above = allowed & (rank > threshold[:, None])
    equal = allowed & (rank == threshold[:, None])
    room = want - tl.sum(above.to(tl.int32), 1)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= room[:, None]))
    place = tl.cumsum(chosen.to(tl.int32), 1) - 1
    tl.store(route_ptr + tl.arange(0, AT_ONCE)[:, None] * SLOTS + place, region, mask=chosen)


@torch.no_grad()
def fused_route(
    queries: Tensor,
    keys: Tensor,
    rule: RouteRule,
    *,
    first_token: int = 0,
    dtype: torch.dtype = torch.float32,
    precision: Precision = "tf32x3",
) -> Tensor:
    """Route query blocks by their affinities to the regions.

    Args:
        queries: [B, G, N, D] descriptors of the query blocks from `first_token` on.
        keys: fp32 [B, G, R * n, D] descriptors of all regions of the sequence.
        rule: how regions are chosen; its router must be "affinity".
        first_token: where the query blocks begin in the sequence.
        dtype: the precision that the descriptors are rounded to; sums are fp32.
        precision: of products of fp32 descriptors: "ieee" is exact, the others nearly so and faster.

    Returns:
        route int64 [B, G, N, K], ascending, -1 = empty.

    Raises:
        ValueError: more regions than a row of the kernel holds.
    """
    batch, groups, num_blocks, head_size = queries.shape
    descriptors = rule.descriptors_per_region
    num_regions = keys.shape[2] // descriptors
    if num_regions > MOST_REGIONS_OF_KERNEL:
        raise ValueError(f"{num_regions} regions; the fused router takes at most {MOST_REGIONS_OF_KERNEL}")
    heads = batch * groups
    queries = queries.reshape(heads, num_blocks, head_size).to(dtype).contiguous()
    keys = keys.reshape(heads, num_regions, descriptors, head_size).permute(2, 0, 1, 3).to(dtype).contiguous()
    route = torch.empty((heads, num_blocks, rule.topk), dtype=torch.int32, device=queries.device)
    first_block = first_token // rule.query_block_size
    for first_tile, tiles, columns in stretches(num_blocks, first_block, num_regions, rule):
        width = max(16, triton.next_power_of_2(columns))
        programs = min(PROGRAMS, tiles * heads)
        rows = torch.empty(programs * BLOCKS * width, dtype=torch.float32, device=queries.device)
        route_blocks[(programs,)](
            queries, keys, rows, route, first_block, first_tile, tiles, num_blocks, heads, num_regions, columns,
            SLOTS=rule.topk, PLACES=triton.next_power_of_2(rule.topk), DESCRIPTORS=descriptors,
            BLOCK=rule.query_block_size, REGION=rule.region_size, D=head_size,
            DIM=max(16, triton.next_power_of_2(head_size)), BLOCKS=BLOCKS, REGIONS=REGIONS, WIDTH=width,
            AT_ONCE=max(1, min(BLOCKS, SELECTED_AT_ONCE // width)), FINALISTS=finalists(rule.topk, width),
            GROUP=GROUP, BITS_OF_BOUND=BITS_OF_BOUND, CAUSAL=rule.causal, OWN=rule.force_own,
            PREVIOUS=rule.force_previous, SINK=rule.attention_sink, PRECISION=precision, num_warps=WARPS,
            num_stages=2,
        )  # fmt: skip
    return route.view(batch, groups, num_blocks, rule.topk).long()


def finalists(slots: int, width: int) -> int:
    """Places for the regions of a row that are compared to the end: those of the best `slots` groups, or all."""
    places = int(triton.next_power_of_2(slots) * GROUP)
    return places if max(2 * places, NARROW) <= width else width


def scanned(width: int, few: int) -> int:
    """Elements of one row that the sums, maxima and scans of `select` go through; `few` are its finalists."""
    if few == width:
        return width * (32 + 3)
    return width * 3 + width // GROUP * BITS_OF_BOUND + few * (32 + 3) + 1


def stretches(num_blocks: int, first_block: int, num_regions: int, rule: RouteRule) -> list[tuple[int, int, int]]:
    """Runs of tiles that need about equally many regions: first tile, tiles, regions that are candidates or forced.

    A causal block looks back only, so each run looks at twice as many regions as the one before it at most.
    """
    all_tiles = -(-num_blocks // BLOCKS)
    if not rule.causal:
        return [(0, all_tiles, num_regions)]

    def columns(tile: int) -> int:
        last_block = first_block + min(num_blocks, (tile + 1) * BLOCKS) - 1
        return last_block * rule.query_block_size // rule.region_size + 1

    stretches, first, limit = [], 0, NARROW
    while first < all_tiles:
        end = first
        while end < all_tiles and columns(end) <= limit:
            end += 1
        if end > first:
            stretches.append((first, end - first, columns(end - 1)))
            first = end
        limit *= 2
    return stretches
