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
        row = at + tl.arange(0, ROWS)
        valid = row < end * visit_rows
        pair = tl.load(order_ptr + row // visit_rows, mask=valid, other=0)
        of_visit = row % visit_rows
        token = (first_block + pair // SLOTS) * BLOCK + of_visit % BLOCK
        plane = (of_visit // BLOCK).to(tl.int64) * q_tokens + token
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
    q_ptr, k_ptr, v_ptr, listed_ptr, members_ptr, counts_ptr, scattered_ptr, part_out_ptr, part_lse_ptr, out_ptr,
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
    row = row_part * ROWS + tl.arange(0, ROWS)
    of_head = row % (TILE * BLOCK)
    query_head = row // (TILE * BLOCK)
    member = of_head // BLOCK
    local_block = tile * TILE + member
    block = first_block + local_block
    token = block * BLOCK + of_head % BLOCK
    valid = (query_head < HEADS) & (local_block < blocks) & (block < all_blocks)
    d = tl.arange(0, DIM)
    inside = valid[:, None] & (d < D)[None, :]
    plane = (head.to(tl.int64) * HEADS + query_head) * q_tokens + token
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
        visit_rows: tl.constexpr = HEADS * BLOCK
        of_visit = query_head * BLOCK + of_head % BLOCK
        pairs = local.to(tl.int64) * blocks * SLOTS
        part_out_ptr += pairs * (PARTS * visit_rows * D)
        part_lse_ptr += pairs * (PARTS * visit_rows)
        scattered_ptr += (head.to(tl.int64) * all_blocks + first_block) * SLOTS
        for slot in range(0, SLOTS):
            pair = local_block * SLOTS + slot
            mine = valid & (tl.load(scattered_ptr + pair, mask=valid, other=0) != 0)
            for part in range(0, PARTS):
                at = (pair * PARTS + part) * visit_rows + of_visit
                lse = tl.load(part_lse_ptr + at, mask=mine, other=-float("inf"))
                x = tl.load(part_out_ptr + at[:, None] * D + d[None, :], mask=mine[:, None] & (d < D)[None, :],
                            other=0.0, eviction_policy="evict_first")  # fmt: skip
                higher = tl.maximum(top, lse)
                weight = tl.exp2(lse - higher)
                fade = tl.exp2(top - higher)
                total = total * fade + weight
                sums = sums * fade[:, None] + x.to(tl.float32) * weight[:, None]
                top = higher
    sums = sums / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + plane[:, None] * D + d[None, :], sums.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + plane, log_sum(top, total) / LOG2_E, mask=valid)
