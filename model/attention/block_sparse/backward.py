"""Backward kernels: gradients of keys and values region by region, those of queries by tile and by scattered pair.

Weights are recomputed from the log-sum-exp of the whole route. Nothing is added by atomic operations: each sum has
one owner and one order, so the same inputs give the same bits. Shapes: see `forward.py`.

Source: FlashAttention-2 (Dao 2023, arXiv:2307.08691, algorithm 2).
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from biroute.model.attention.block_sparse.forward import LOG2_E, LOWEST, load_part, rows_of_tile, visitors
from biroute.model.attention.block_sparse.plan_kernels import SCATTERED as SCATTERED_PAIR


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
    extra_first_ptr, members_ptr, part_dq_ptr, dk_ptr, dv_ptr, extra_dk_ptr, extra_dv_ptr, first_segment, chunks,
    blocks, all_blocks, all_tiles, units, extras, q_tokens, k_tokens, regions, scale, scale2,
    SLOTS: tl.constexpr, LISTED: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    REGION: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr,
    DIM: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, TILE_UNIT: tl.constexpr, CAUSAL: tl.constexpr,
    SCATTERED: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One unit: tiles that share a part of a region, then its scattered pairs, while the part stays on chip.

    Where a segment is a whole sequence (WHOLE), the only unit of a region writes its dk, dv [Z, S, D], and each of
    several writes to extra_dk, extra_dv fp32 [segments of the launch, units, PARTS, PART, D]. Otherwise dk, dv are
    fp32 sums [S, D] of the head at hand: the first unit of a region adds to what earlier segments left there, and
    further ones write to extra_dk, extra_dv [segments of the head, extras, PARTS, PART, D]; see `finish_head`.
    Scattered pairs also write their part of dq.
    """
    unit, local, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if PARTS == 1:
        part = 0 * part  # no key of a region is masked then, which saves registers
    segment = first_segment + local
    region = tl.load(unit_region_ptr + segment * units + unit)
    if region >= regions:
        return
    head = segment // chunks
    edge = segment * (regions + 1) + region
    of_region = unit - tl.load(unit_first_ptr + edge)
    start_ptr += 2 * region
    dk, dv, key, real = gradients_of_unit(
        q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, order_ptr, start_ptr + segment * (2 * regions + 1),
        members_ptr, part_dq_ptr, of_region, segment, local, region, part, chunks, blocks, all_blocks, all_tiles,
        q_tokens, k_tokens, scale, scale2,
        SLOTS, LISTED, HEADS, BLOCK, TILE, REGION, PARTS, PART, KEYS, D, DIM, ROWS, UNIT, TILE_UNIT, CAUSAL,
        SCATTERED, PRECISION,
    )  # fmt: skip
    if WHOLE:
        alone = tl.load(unit_first_ptr + edge + 1) == unit - of_region + 1
        row_of_extras, extra = local, unit
        of_head = head.to(tl.int64) * k_tokens * D
        dk_ptr += of_head
        dv_ptr += of_head
    else:
        alone = of_region == 0
        row_of_extras, extra = segment % chunks, tl.load(extra_first_ptr + edge) + of_region - 1
    d = tl.arange(0, DIM)
    inside = real[:, None] & (d < D)[None, :]
    within = tl.arange(0, KEYS)[:, None] * D + d[None, :]
    if alone:
        to = key[:, None] * D + d[None, :]
        if WHOLE == 0:
            before = number_of_visits(start_ptr, segment - segment % chunks, segment, regions)
            earlier = inside & (before > 0)
            dk += tl.load(dk_ptr + to, mask=earlier, other=0.0)
            dv += tl.load(dv_ptr + to, mask=earlier, other=0.0)
        tl.store(dk_ptr + to, dk.to(dk_ptr.dtype.element_ty), mask=inside)
        tl.store(dv_ptr + to, dv.to(dv_ptr.dtype.element_ty), mask=inside)
    else:
        beyond = ((row_of_extras.to(tl.int64) * extras + extra) * PARTS + part) * (PART * D)
        tl.store(extra_dk_ptr + beyond + within, dk, mask=inside)
        tl.store(extra_dv_ptr + beyond + within, dv, mask=inside)


@triton.jit
def gradients_of_unit(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, order_ptr, start_ptr, members_ptr, part_dq_ptr, of_region,
    segment, local, region, part, chunks, blocks, all_blocks, all_tiles, q_tokens, k_tokens, scale, scale2,
    SLOTS: tl.constexpr, LISTED: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    REGION: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr,
    DIM: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, TILE_UNIT: tl.constexpr, CAUSAL: tl.constexpr,
    SCATTERED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv fp32 [KEYS, DIM] of unit `of_region` of a region, its tokens and which are real.

    start_ptr is where the region's tiles, its scattered pairs and the next region's tiles begin in `order`.
    """
    visit_rows: tl.constexpr = HEADS * BLOCK
    head = segment // chunks
    begin = tl.load(start_ptr) + of_region * TILE_UNIT
    first_block = (segment % chunks) * blocks
    pairs = blocks * SLOTS
    order_ptr += segment.to(tl.int64) * pairs
    k, key, real = load_part(k_ptr, head, region, part, k_tokens, REGION, PART, KEYS, D, DIM)
    v, _, _ = load_part(v_ptr, head, region, part, k_tokens, REGION, PART, KEYS, D, DIM)
    first_row = head.to(tl.int64) * HEADS * q_tokens
    q_ptr += first_row * D
    dout_ptr += first_row * D
    lse_ptr += first_row
    delta_ptr += first_row
    dk = tl.zeros([KEYS, DIM], tl.float32)
    dv = tl.zeros([KEYS, DIM], tl.float32)
    dk, dv = stream_tiles(
        dk, dv, q_ptr, dout_ptr, lse_ptr, delta_ptr, order_ptr,
        members_ptr + (head * all_tiles + first_block // TILE).to(tl.int64) * LISTED, begin,
        tl.minimum(tl.load(start_ptr + 1), begin + TILE_UNIT), k, v, key, real, first_block, blocks,
        all_blocks, q_tokens, scale2, LISTED, HEADS, BLOCK, TILE, D, DIM, ROWS, CAUSAL, PRECISION,
    )  # fmt: skip
    if SCATTERED:
        begin = tl.load(start_ptr + 1) + of_region * UNIT
        end = tl.minimum(tl.load(start_ptr + 2), begin + UNIT)
        dk, dv = stream_pairs(
            dk, dv, q_ptr, dout_ptr, lse_ptr, delta_ptr, order_ptr,
            part_dq_ptr + local.to(tl.int64) * pairs * (PARTS * visit_rows * D), begin * visit_rows,
            end * visit_rows, k, v, key, real, part, first_block, q_tokens, scale, scale2,
            SLOTS, HEADS, BLOCK, PARTS, D, DIM, ROWS, CAUSAL, PRECISION,
        )  # fmt: skip
    return dk * scale, dv, key, real


@triton.jit
def number_of_visits(start_ptr, first, end, regions):
    """Visits of a region in the segments `first` to `end`; start_ptr is at the region in segment 0."""
    number = tl.zeros([], tl.int32)
    for other in range(first, end):
        at = start_ptr + other * (2 * regions + 1)
        number += tl.load(at + 2) - tl.load(at)
    return number


@triton.jit
def places_of_part(part, REGION: tl.constexpr, PART: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr,
                   DIM: tl.constexpr):  # fmt: skip
    """Places [KEYS, DIM] of the elements of a part of a region, from its first one on; and which of them are real."""
    key, d = tl.arange(0, KEYS), tl.arange(0, DIM)
    real = (key < PART) & (part * PART + key < REGION)
    return key[:, None] * D + d[None, :], real[:, None] & (d < D)[None, :]


@triton.jit
def load_rows(q_ptr, dout_ptr, lse_ptr, delta_ptr, plane, valid, D: tl.constexpr, DIM: tl.constexpr):
    """Queries and upstream gradients [ROWS, DIM] of the rows `plane`, their lse and delta; zeros if not `valid`."""
    d = tl.arange(0, DIM)
    inside = valid[:, None] & (d < D)[None, :]
    at = plane[:, None] * D + d[None, :]
    q = tl.load(q_ptr + at, mask=inside, other=0.0)
    dout = tl.load(dout_ptr + at, mask=inside, other=0.0)
    return q, dout, tl.load(lse_ptr + plane, mask=valid, other=0.0), tl.load(delta_ptr + plane, mask=valid, other=0.0)


@triton.jit
def add_rows(
    dk, dv, q_ptr, dout_ptr, lse_ptr, delta_ptr, k, v, key, real, token, plane, valid, chose, scale2,
    MEMBERS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv fp32 [KEYS, DIM] with what the rows that `chose` names add; their gradients of scores."""
    q, dout, lse, delta = load_rows(q_ptr, dout_ptr, lse_ptr, delta_ptr, plane, valid, D, DIM)
    # Rows that are not valid are zeros, which add nothing.
    sees = real[None, :]
    if MEMBERS:
        sees = sees & chose[:, None]
    if CAUSAL:
        sees = sees & (key[None, :] <= token[:, None])
    weight, dscore = gradient_of_scores(q, k, v, dout, lse, delta, sees, scale2, PRECISION)
    dscore = dscore.to(q.dtype)
    dv += tl.dot(tl.trans(weight.to(dout.dtype)), dout, input_precision=PRECISION)
    dk += tl.dot(tl.trans(dscore), q, input_precision=PRECISION)
    return dk, dv, dscore


@triton.jit
def stream_tiles(
    dk, dv, q_ptr, dout_ptr, lse_ptr, delta_ptr, order_ptr, members_ptr, begin, end, k, v, key, real,
    first_block, blocks, all_blocks, q_tokens, scale2,
    LISTED: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr,
    DIM: tl.constexpr, ROWS: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv with what the tiles `begin` to `end` of `order` add, which share the region: rows as they lie."""
    pieces: tl.constexpr = (TILE * HEADS * BLOCK + ROWS - 1) // ROWS
    for at in range(begin * pieces, end * pieces):
        entry = tl.load(order_ptr + at // pieces)
        member, _, _, token, plane, valid = rows_of_tile(
            entry // LISTED, at % pieces, first_block, blocks, all_blocks, 0, q_tokens, HEADS, BLOCK, TILE, ROWS
        )
        chose = valid
        if TILE > 1:
            chose = ((tl.load(members_ptr + entry) >> member) & 1) != 0
        dk, dv, _ = add_rows(
            dk, dv, q_ptr, dout_ptr, lse_ptr, delta_ptr, k, v, key, real, token, plane, valid, chose, scale2,
            TILE > 1, D, DIM, CAUSAL, PRECISION,
        )  # fmt: skip
    return dk, dv


@triton.jit
def stream_pairs(
    dk, dv, q_ptr, dout_ptr, lse_ptr, delta_ptr, order_ptr, part_dq_ptr, begin, end, k, v, key, real, part,
    first_block, q_tokens, scale, scale2,
    SLOTS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr,
    DIM: tl.constexpr, ROWS: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv with what the rows `begin` to `end` of scattered pairs add; their part of dq goes to part_dq."""
    d = tl.arange(0, DIM)
    for at in range(begin, end, ROWS):
        pair, of_visit, token, plane, valid = visitors(
            order_ptr, at, end, first_block, q_tokens, SLOTS, HEADS, BLOCK, ROWS
        )
        dk, dv, dscore = add_rows(
            dk, dv, q_ptr, dout_ptr, lse_ptr, delta_ptr, k, v, key, real, token, plane, valid, valid, scale2,
            False, D, DIM, CAUSAL, PRECISION,
        )  # fmt: skip
        dq = tl.dot(dscore, k, input_precision=PRECISION) * scale
        to = (pair * PARTS + part) * (HEADS * BLOCK) + of_visit
        tl.store(part_dq_ptr + to[:, None] * D + d[None, :], dq.to(part_dq_ptr.dtype.element_ty),
                 mask=valid[:, None] & (d < D)[None, :], eviction_policy="evict_first")  # fmt: skip
    return dk, dv


@triton.jit
def add_units(
    dk, dv, extra_dk_ptr, extra_dv_ptr, local, units, first, end, part, within, inside, PARTS: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv what the units from `first` to `end` of a launch's segment wrote, one after the other."""
    for unit in range(first, end):
        at = ((local.to(tl.int64) * units + unit) * PARTS + part) * SIZE + within
        dk += tl.load(extra_dk_ptr + at, mask=inside, other=0.0)
        dv += tl.load(extra_dv_ptr + at, mask=inside, other=0.0)
    return dk, dv


@triton.jit(do_not_specialize=["segment", "chunks"])
def finish_head(
    start_ptr, extra_first_ptr, sum_dk_ptr, sum_dv_ptr, extra_dk_ptr, extra_dv_ptr, dk_ptr, dv_ptr, segment, chunks,
    extras, k_tokens, regions,
    REGION: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    """After a head's last segment: its sums [S, D] and what further units wrote, one after the other, go to dk, dv.

    Regions that nobody visited have no sums, and get zeros.
    """
    region, part = tl.program_id(0), tl.program_id(1)
    first = segment + 1 - chunks
    within, inside = places_of_part(part, REGION, PART, KEYS, D, DIM)
    at = region * (REGION * D) + part * (PART * D) + within
    summed = inside & (number_of_visits(start_ptr + 2 * region, first, segment + 1, regions) > 0)
    dk = tl.load(sum_dk_ptr + at, mask=summed, other=0.0)
    dv = tl.load(sum_dv_ptr + at, mask=summed, other=0.0)
    for other in range(0, chunks):
        edge = (first + other) * (regions + 1) + region
        begin, end = tl.load(extra_first_ptr + edge), tl.load(extra_first_ptr + edge + 1)
        dk, dv = add_units(dk, dv, extra_dk_ptr, extra_dv_ptr, other + tl.zeros([], tl.int32), extras, begin, end,
                           part, within, inside, PARTS, PART * D)  # fmt: skip
    of_head = (segment // chunks).to(tl.int64) * k_tokens * D
    tl.store(dk_ptr + of_head + at, dk.to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + of_head + at, dv.to(dv_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first_segment"])
def join_units(
    unit_first_ptr, dk_ptr, dv_ptr, extra_dk_ptr, extra_dv_ptr, first_segment, units, k_tokens, regions,
    REGION: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    """After a launch of whole sequences: dk and dv [Z, S, D] of regions that have several units, or none."""
    region, local, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    segment = first_segment + local
    edge = segment * (regions + 1) + region
    first = tl.load(unit_first_ptr + edge)
    end = tl.load(unit_first_ptr + edge + 1)
    if end == first + 1:
        return
    within, inside = places_of_part(part, REGION, PART, KEYS, D, DIM)
    dk = tl.zeros([KEYS, DIM], tl.float32)
    dv = tl.zeros([KEYS, DIM], tl.float32)
    dk, dv = add_units(dk, dv, extra_dk_ptr, extra_dv_ptr, local, units, first, end, part, within, inside,
                       PARTS, PART * D)  # fmt: skip
    to = segment.to(tl.int64) * k_tokens * D + region * (REGION * D) + part * (PART * D) + within
    tl.store(dk_ptr + to, dk.to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + to, dv.to(dv_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first_segment", "chunks"])
def query_backward(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, listed_ptr, members_ptr, counts_ptr, flags_ptr,
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
    member, local_block, of_visit, token, plane, valid = rows_of_tile(
        tile, row_part, first_block, blocks, all_blocks, head, q_tokens, HEADS, BLOCK, TILE, ROWS
    )
    q, dout, lse, delta = load_rows(q_ptr, dout_ptr, lse_ptr, delta_ptr, plane, valid, D, DIM)
    d = tl.arange(0, DIM)
    inside = valid[:, None] & (d < D)[None, :]
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
        part_dq_ptr += local.to(tl.int64) * blocks * SLOTS * (PARTS * visit_rows * D)
        flags_ptr += (head.to(tl.int64) * all_blocks + first_block) * SLOTS
        for slot in range(0, SLOTS):
            pair = local_block * SLOTS + slot
            mine = valid & (tl.load(flags_ptr + pair, mask=valid, other=0) >= SCATTERED_PAIR)
            for part in range(0, PARTS):
                at = (pair * PARTS + part) * visit_rows + of_visit
                x = tl.load(part_dq_ptr + at[:, None] * D + d[None, :], mask=mine[:, None] & (d < D)[None, :],
                            other=0.0, eviction_policy="evict_first")  # fmt: skip
                dq += x.to(tl.float32)
    tl.store(dq_ptr + plane[:, None] * D + d[None, :], dq.to(dq_ptr.dtype.element_ty), mask=inside)
