"""Backward kernels: gradients of keys and values region by region, those of queries by tile and by scattered pair.

Weights are recomputed from the log-sum-exp of the whole route. Nothing is added by atomic operations: each sum has
one owner and one order, so the same inputs give the same bits. Shapes: see `forward.py`.

Source: FlashAttention-2 (Dao 2023, arXiv:2307.08691, algorithm 2).
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from biroute.model.attention.block_sparse.forward import LOG2_E, LOWEST, load_part


@triton.jit
def output_delta(out_ptr, dout_ptr, delta_ptr, rows, D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr):
    """Sum over D of out * dout, both [rows, D] -> fp32 [rows]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DIM)
    at = row[:, None] * D + d[None, :]
    inside = (row < rows)[:, None] & (d < D)[None, :]
    out = tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(delta_ptr + row, tl.sum(out * dout, 1), mask=row < rows)


@triton.jit
def gradient_of_scores(q, k, v, dout, lse, delta, sees, scale2, PRECISION: tl.constexpr):
    """Weights and the gradient of the scaled scores of a product of queries and keys, both fp32 [ROWS, KEYS]."""
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
    weight = tl.where(sees, tl.exp2(tl.where(sees, score - (lse * LOG2_E)[:, None], LOWEST)), 0.0)
    return weight, weight * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])


@triton.jit(do_not_specialize=["first_segment", "chunks"])
def region_backward(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, order_ptr, start_ptr, unit_region_ptr, unit_first_ptr,
    extra_first_ptr, scattered_ptr, part_dq_ptr, dk_ptr, dv_ptr, extra_dk_ptr, extra_dv_ptr,
    first_segment, chunks, blocks, all_blocks, units, extras, q_tokens, k_tokens, regions, scale, scale2,
    SLOTS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, REGION: tl.constexpr, PARTS: tl.constexpr,
    PART: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    UNIT: tl.constexpr, CAUSAL: tl.constexpr, SCATTERED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One unit: all visitors of a part of a region, shared or scattered.

    The first unit of a region adds to its fp32 dk, dv [Z, S, D]; further ones write to extra_dk,
    extra_dv [segments of the launch, extras, PARTS, PART, D]. Scattered pairs also write their part of dq.
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
    of_region = unit - tl.load(unit_first_ptr + edge)
    begin = tl.load(start_ptr + edge) + of_region * UNIT
    end = tl.minimum(tl.load(start_ptr + edge + 1), begin + UNIT)
    k, key, real = load_part(k_ptr, head, region, part, k_tokens, REGION, PART, KEYS, D, DIM)
    v, _, _ = load_part(v_ptr, head, region, part, k_tokens, REGION, PART, KEYS, D, DIM)
    d = tl.arange(0, DIM)
    pairs = blocks * SLOTS
    order_ptr += segment.to(tl.int64) * pairs
    scattered_ptr += (head.to(tl.int64) * all_blocks + first_block) * SLOTS
    part_dq_ptr += local.to(tl.int64) * pairs * (PARTS * visit_rows * D)
    first_plane = head.to(tl.int64) * HEADS * q_tokens
    dk = tl.zeros([KEYS, DIM], tl.float32)
    dv = tl.zeros([KEYS, DIM], tl.float32)
    for at in range(begin * visit_rows, end * visit_rows, ROWS):
        row = at + tl.arange(0, ROWS)
        valid = row < end * visit_rows
        pair = tl.load(order_ptr + row // visit_rows, mask=valid, other=0)
        of_visit = row % visit_rows
        token = (first_block + pair // SLOTS) * BLOCK + of_visit % BLOCK
        plane = first_plane + (of_visit // BLOCK).to(tl.int64) * q_tokens + token
        inside = valid[:, None] & (d < D)[None, :]
        q = tl.load(q_ptr + plane[:, None] * D + d[None, :], mask=inside, other=0.0)
        dout = tl.load(dout_ptr + plane[:, None] * D + d[None, :], mask=inside, other=0.0)
        lse = tl.load(lse_ptr + plane, mask=valid, other=0.0)
        delta = tl.load(delta_ptr + plane, mask=valid, other=0.0)
        sees = valid[:, None] & real[None, :]
        if CAUSAL:
            sees = sees & (key[None, :] <= token[:, None])
        weight, dscore = gradient_of_scores(q, k, v, dout, lse, delta, sees, scale2, PRECISION)
        dv += tl.dot(tl.trans(weight.to(dout.dtype)), dout, input_precision=PRECISION)
        dscore = dscore.to(q.dtype)
        dk += tl.dot(tl.trans(dscore), q, input_precision=PRECISION)
        if SCATTERED:
            mine = valid & (tl.load(scattered_ptr + pair, mask=valid, other=0) != 0)
            dq = tl.dot(dscore, k, input_precision=PRECISION) * scale
            to = (pair * PARTS + part) * visit_rows + of_visit
            tl.store(part_dq_ptr + to[:, None] * D + d[None, :], dq.to(part_dq_ptr.dtype.element_ty),
                     mask=mine[:, None] & (d < D)[None, :], eviction_policy="evict_first")  # fmt: skip
    inside = real[:, None] & (d < D)[None, :]
    dk = dk * scale
    if of_region == 0:
        to = head.to(tl.int64) * k_tokens * D + key[:, None] * D + d[None, :]
        tl.store(dk_ptr + to, tl.load(dk_ptr + to, mask=inside, other=0.0) + dk, mask=inside)
        tl.store(dv_ptr + to, tl.load(dv_ptr + to, mask=inside, other=0.0) + dv, mask=inside)
    else:
        extra = tl.load(extra_first_ptr + edge) + of_region - 1
        to = ((local.to(tl.int64) * extras + extra) * PARTS + part) * (PART * D)
        to += tl.arange(0, KEYS)[:, None] * D + d[None, :]
        tl.store(extra_dk_ptr + to, dk, mask=inside)
        tl.store(extra_dv_ptr + to, dv, mask=inside)


@triton.jit(do_not_specialize=["first_segment", "chunks"])
def add_extra_units(
    extra_first_ptr, dk_ptr, dv_ptr, extra_dk_ptr, extra_dv_ptr, first_segment, chunks, extras, k_tokens, regions,
    REGION: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    """Add what a region's further units wrote to its dk and dv, unit after unit."""
    region, local, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    segment = first_segment + local
    edge = segment * (regions + 1) + region
    first = tl.load(extra_first_ptr + edge)
    end = tl.load(extra_first_ptr + edge + 1)
    if first == end:
        return
    dk, key, real = load_part(dk_ptr, segment // chunks, region, part, k_tokens, REGION, PART, KEYS, D, DIM)
    dv, _, _ = load_part(dv_ptr, segment // chunks, region, part, k_tokens, REGION, PART, KEYS, D, DIM)
    d = tl.arange(0, DIM)
    inside = real[:, None] & (d < D)[None, :]
    within = tl.arange(0, KEYS)[:, None] * D + d[None, :]
    for extra in range(first, end):
        at = ((local.to(tl.int64) * extras + extra) * PARTS + part) * (PART * D) + within
        dk += tl.load(extra_dk_ptr + at, mask=inside, other=0.0)
        dv += tl.load(extra_dv_ptr + at, mask=inside, other=0.0)
    to = (segment // chunks).to(tl.int64) * k_tokens * D + key[:, None] * D + d[None, :]
    tl.store(dk_ptr + to, dk, mask=inside)
    tl.store(dv_ptr + to, dv, mask=inside)


@triton.jit(do_not_specialize=["first_segment", "chunks"])
def query_backward(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, listed_ptr, members_ptr, counts_ptr, scattered_ptr,
    part_dq_ptr, dq_ptr, first_segment, chunks, blocks, all_blocks, all_tiles, q_tokens, k_tokens, scale, scale2,
    SLOTS: tl.constexpr, LISTED: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    REGION: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr,
    DIM: tl.constexpr, ROWS: tl.constexpr, CAUSAL: tl.constexpr, SCATTERED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries: dq [Z, r, S, D] over the regions that it shares, and from its scattered pairs."""
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
    dout = tl.load(dout_ptr + plane[:, None] * D + d[None, :], mask=inside, other=0.0)
    lse = tl.load(lse_ptr + plane, mask=valid, other=0.0)
    delta = tl.load(delta_ptr + plane, mask=valid, other=0.0)
    dq = tl.zeros([ROWS, DIM], tl.float32)
    all_tile = head * all_tiles + first_block // TILE + tile
    count = tl.load(counts_ptr + all_tile)
    lists = all_tile.to(tl.int64) * LISTED
    for u in range(0, count * PARTS):
        region = tl.load(listed_ptr + lists + u // PARTS)
        k, key, real = load_part(k_ptr, head, region, u % PARTS, k_tokens, REGION, PART, KEYS, D, DIM)
        v, _, _ = load_part(v_ptr, head, region, u % PARTS, k_tokens, REGION, PART, KEYS, D, DIM)
        sees = valid[:, None] & real[None, :]
        if TILE > 1:
            bits = tl.load(members_ptr + lists + u // PARTS)
            sees = sees & (((bits >> member) & 1) != 0)[:, None]
        if CAUSAL:
            sees = sees & (key[None, :] <= token[:, None])
        _, dscore = gradient_of_scores(q, k, v, dout, lse, delta, sees, scale2, PRECISION)
        dq += tl.dot(dscore.to(k.dtype), k, input_precision=PRECISION)
    dq = dq * scale
    if SCATTERED:
        visit_rows: tl.constexpr = HEADS * BLOCK
        of_visit = query_head * BLOCK + of_head % BLOCK
        part_dq_ptr += local.to(tl.int64) * blocks * SLOTS * (PARTS * visit_rows * D)
        scattered_ptr += (head.to(tl.int64) * all_blocks + first_block) * SLOTS
        for slot in range(0, SLOTS):
            pair = local_block * SLOTS + slot
            mine = valid & (tl.load(scattered_ptr + pair, mask=valid, other=0) != 0)
            for part in range(0, PARTS):
                at = (pair * PARTS + part) * visit_rows + of_visit
                x = tl.load(part_dq_ptr + at[:, None] * D + d[None, :], mask=mine[:, None] & (d < D)[None, :],
                            other=0.0, eviction_policy="evict_first")  # fmt: skip
                dq += x.to(tl.float32)
    tl.store(dq_ptr + plane[:, None] * D + d[None, :], dq.to(dq_ptr.dtype.element_ty), mask=inside)
