"""Forward kernels: scattered pairs region by region, then tiles of queries over the regions that they share.

Shapes: Z = B * G key/value heads of all sequences, r query heads of each, S query tokens, N query blocks, M = Lq
tokens of a block, K slots of a route, R regions, D head size, T tiles, U most shared regions of a tile. Scores and
log-sum-exps inside are to the base 2. Block sizes (ROWS, KEYS, DIM) are powers of two; what lies beyond the real
sizes is masked.

Source: the running maximum and sum are those of FlashAttention (Dao et al. 2022, arXiv:2205.14135, algorithm 1).
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from biroute.model.attention.block_sparse.plan_kernels import SCATTERED as SCATTERED_PAIR

LOWEST = tl.constexpr(-1.0e30)  # a score below every real one that can still be subtracted from itself
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_part(table, head, region, part, tokens, REGION: tl.constexpr, PART: tl.constexpr, KEYS: tl.constexpr,
              D: tl.constexpr, DIM: tl.constexpr):  # fmt: skip
    """A part of a region's keys or values [KEYS, DIM], zeros beyond its tokens; the tokens, and which are real."""
    inside = tl.arange(0, KEYS)
    within = part * PART + inside
    real = (inside < PART) & (within < REGION)
    token = region * REGION + within
    d = tl.arange(0, DIM)
    # A plane of one head stays below 2^31 elements (checked by the host); the planes before it may not.
    at = table + head.to(tl.int64) * tokens * D + token[:, None] * D + d[None, :]
    return tl.load(at, mask=real[:, None] & (d < D)[None, :], other=0.0), token, real


@triton.jit
def visitors(order_ptr, at, end, first_block, q_tokens, SLOTS: tl.constexpr, HEADS: tl.constexpr,
             BLOCK: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Query rows `at` to `end` of a region's visits: pair, place in the visit, token, place among the heads' rows."""
    visit_rows: tl.constexpr = HEADS * BLOCK
    row = at + tl.arange(0, ROWS)
    valid = row < end
    pair = tl.load(order_ptr + row // visit_rows, mask=valid, other=0)
    of_visit = row % visit_rows
    token = (first_block + pair // SLOTS) * BLOCK + of_visit % BLOCK
    return pair, of_visit, token, (of_visit // BLOCK).to(tl.int64) * q_tokens + token, valid


@triton.jit
def rows_of_tile(tile, row_part, first_block, blocks, all_blocks, head, q_tokens, HEADS: tl.constexpr,
                 BLOCK: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Query rows of a tile: block of the tile, block of the segment, place in a visit, token, row of [Z, r, S]."""
    row = row_part * ROWS + tl.arange(0, ROWS)
    of_head = row % (TILE * BLOCK)
    query_head = row // (TILE * BLOCK)
    member = of_head // BLOCK
    local_block = tile * TILE + member
    block = first_block + local_block
    token = block * BLOCK + of_head % BLOCK
    valid = (query_head < HEADS) & (local_block < blocks) & (block < all_blocks)
    plane = (head * HEADS + query_head).to(tl.int64) * q_tokens + token
    return member, local_block, query_head * BLOCK + of_head % BLOCK, token, plane, valid


@triton.jit
def add_scattered(sums, top, total, part_out_ptr, part_lse_ptr, flags_ptr, local_block, of_visit, valid,
                  SLOTS: tl.constexpr, VISIT_ROWS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr,
                  DIM: tl.constexpr):  # fmt: skip
    """Join the partial results of a tile's scattered pairs to its running maximum and sums, slot after slot."""
    d = tl.arange(0, DIM)
    for slot in range(0, SLOTS):
        pair = local_block * SLOTS + slot
        mine = valid & (tl.load(flags_ptr + pair, mask=valid, other=0) >= SCATTERED_PAIR)
        for part in range(0, PARTS):
            at = (pair * PARTS + part) * VISIT_ROWS + of_visit
            lse = tl.load(part_lse_ptr + at, mask=mine, other=-float("inf"))
            x = tl.load(part_out_ptr + at[:, None] * D + d[None, :], mask=mine[:, None] & (d < D)[None, :],
                        other=0.0, eviction_policy="evict_first")  # fmt: skip
            higher = tl.maximum(top, lse)
            weight = tl.exp2(lse - higher)
            fade = tl.exp2(top - higher)
            total = total * fade + weight
            sums = sums * fade[:, None] + x.to(tl.float32) * weight[:, None]
            top = higher
    return sums, top, total


@triton.jit
def log_sum(top, total):
    """The base-2 logarithm of a sum of weights relative to `top`; -inf where nothing was summed."""
    return tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), -float("inf"))


@triton.jit(do_not_specialize=["first_segment", "chunks"])
def region_forward(
    q_ptr, k_ptr, v_ptr, order_ptr, start_ptr, unit_region_ptr, unit_first_ptr, part_out_ptr, part_lse_ptr,
    first_segment, chunks, blocks, units, q_tokens, k_tokens, regions, scale2,
    SLOTS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, REGION: tl.constexpr, PARTS: tl.constexpr,
    PART: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    UNIT: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One unit: part of a region's keys and values stay on chip while its scattered visitors are streamed past them.

    Writes the normalised output of each pair, part_out [segments of the launch, n, K, PARTS, r, M, D], and its
    log-sum-exp.
    """
    unit, local, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    segment = first_segment + local
    region = tl.load(unit_region_ptr + segment * units + unit)
    if region >= regions:
        return
    visit_rows: tl.constexpr = HEADS * BLOCK
    head = segment // chunks
    first_block = (segment % chunks) * blocks
    edge = segment * (regions + 1) + region
    begin = tl.load(start_ptr + edge) + (unit - tl.load(unit_first_ptr + edge)) * UNIT
    end = tl.minimum(tl.load(start_ptr + edge + 1), begin + UNIT)
    k, key, real = load_part(k_ptr, head, region, part, k_tokens, REGION, PART, KEYS, D, DIM)
    v, _, _ = load_part(v_ptr, head, region, part, k_tokens, REGION, PART, KEYS, D, DIM)
    d = tl.arange(0, DIM)
    pairs = blocks * SLOTS
    order_ptr += segment.to(tl.int64) * pairs
    part_out_ptr += local.to(tl.int64) * pairs * (PARTS * visit_rows * D)
    part_lse_ptr += local.to(tl.int64) * pairs * (PARTS * visit_rows)
    q_ptr += head.to(tl.int64) * HEADS * q_tokens * D
    for at in range(begin * visit_rows, end * visit_rows, ROWS):
        pair, of_visit, token, plane, valid = visitors(
            order_ptr, at, end * visit_rows, first_block, q_tokens, SLOTS, HEADS, BLOCK, ROWS
        )
        inside = valid[:, None] & (d < D)[None, :]
        q = tl.load(q_ptr + plane[:, None] * D + d[None, :], mask=inside, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
        sees = real[None, :]
        if CAUSAL:
            sees = sees & (key[None, :] <= token[:, None])
        score = tl.where(sees, score, LOWEST)
        top = tl.max(score, 1)
        weight = tl.where(sees, tl.exp2(score - top[:, None]), 0.0)
        total = tl.sum(weight, 1)
        out = tl.dot(weight.to(v.dtype), v, input_precision=PRECISION) / tl.where(total > 0, total, 1.0)[:, None]
        to = (pair * PARTS + part) * visit_rows + of_visit
        tl.store(part_out_ptr + to[:, None] * D + d[None, :], out.to(part_out_ptr.dtype.element_ty), mask=inside,
                 eviction_policy="evict_first")  # fmt: skip
        tl.store(part_lse_ptr + to, log_sum(top, total), mask=valid)


@triton.jit(do_not_specialize=["first_segment", "chunks"])
def query_forward(
    q_ptr, k_ptr, v_ptr, listed_ptr, members_ptr, counts_ptr, flags_ptr, part_out_ptr, part_lse_ptr, out_ptr,
    lse_ptr, first_segment, chunks, blocks, all_blocks, all_tiles, q_tokens, k_tokens, scale2,
    SLOTS: tl.constexpr, LISTED: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    REGION: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr,
    DIM: tl.constexpr, ROWS: tl.constexpr, CAUSAL: tl.constexpr, SCATTERED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries: dense products with the regions that it shares, then its scattered partial results.

    Writes out [Z, r, S, D] and the natural log-sum-exp [Z, r, S] (0 and -inf for a query without a visible key).
    """
    tile, row_part, local = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    segment = first_segment + local
    head = segment // chunks
    first_block = (segment % chunks) * blocks
    if first_block + tile * TILE >= all_blocks:
        return  # the last segment of a sequence may be shorter
    member, local_block, of_visit, token, plane, valid = rows_of_tile(
        tile, row_part, first_block, blocks, all_blocks, head, q_tokens, HEADS, BLOCK, TILE, ROWS
    )
    d = tl.arange(0, DIM)
    inside = valid[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + plane[:, None] * D + d[None, :], mask=inside, other=0.0)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIM], tl.float32)
    all_tile = head * all_tiles + first_block // TILE + tile
    count = tl.load(counts_ptr + all_tile)
    lists = all_tile.to(tl.int64) * LISTED
    for u in range(0, count * PARTS):
        region = tl.load(listed_ptr + lists + u // PARTS)
        k, key, real = load_part(k_ptr, head, region, u % PARTS, k_tokens, REGION, PART, KEYS, D, DIM)
        v, _, _ = load_part(v_ptr, head, region, u % PARTS, k_tokens, REGION, PART, KEYS, D, DIM)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
        sees = real[None, :]
        if TILE > 1:
            bits = tl.load(members_ptr + lists + u // PARTS)
            sees = sees & (((bits >> member) & 1) != 0)[:, None]
        if CAUSAL:
            sees = sees & (key[None, :] <= token[:, None])
        score = tl.where(sees, score, LOWEST)
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.where(sees, tl.exp2(score - higher[:, None]), 0.0)
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weight, 1)
        sums = sums * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
        top = higher
    if SCATTERED:
        pairs = local.to(tl.int64) * blocks * SLOTS
        sums, top, total = add_scattered(
            sums, top, total, part_out_ptr + pairs * (PARTS * HEADS * BLOCK * D),
            part_lse_ptr + pairs * (PARTS * HEADS * BLOCK),
            flags_ptr + (head.to(tl.int64) * all_blocks + first_block) * SLOTS,
            local_block, of_visit, valid, SLOTS, HEADS * BLOCK, PARTS, D, DIM,
        )  # fmt: skip
    sums = sums / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + plane[:, None] * D + d[None, :], sums.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + plane, log_sum(top, total) / LOG2_E, mask=valid)
