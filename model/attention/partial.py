"""Attention over any set of key regions, forward and backward: what context-parallel ranks build on.

`partial_attention` gives the output and the log-sum-exp over the regions that it gets, `merge_partials` combines such
parts, and `partial_attention_backward` takes the log-sum-exp and delta of the *whole* route. Queries and regions may
be of any number, so the same functions serve a rank's own regions, regions fetched from other ranks, and queries that
other ranks shipped.

On the CPU one key/value head of one sequence is computed after the other, in chunks that read and write the tensors
in place. The route is cut into a dense band (`band.py`: the own region and the one before) and tiles (`tiles.py`: all
other regions). All weights of a query row are relative to one softmax offset, the largest exponent in its band, so
partial sums add up without rescaling; a row whose sum would overflow gets its exact maximum instead. Backward
computes the weights again.

Shapes: B sequences, H query heads, G key/value heads, r query heads of a key/value head, S query tokens, Sk key
tokens, D head size, L tokens of a region, R regions in k and v, Lq (suffix M) tokens of a query block, N query
blocks, K slots of a route.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from biroute.model.attention.band import Band, band_backward, band_forward
from biroute.model.attention.grid import KERNEL_DEVICES, RegionGrid, uses_kernels
from biroute.model.attention.paths import ROWS_PER_TILE
from biroute.model.attention.tiles import (
    LOG2_E,
    Gradients,
    Inputs,
    Tiles,
    Upstream,
    Workspace,
    query_major_tiles,
    region_major_tiles,
    tile_elements,
    tiles_backward,
    tiles_forward,
    tiles_max,
)

# A sum of weights above this may have lost terms to overflow (fp32 ends at 2^128).
LARGEST_SUM = 2.0**100
# Bounds of a chunk's buffers in elements: few enough to stay in cache, enough to hide the cost of a call.
CHUNK_ELEMENTS = (1 << 17, 3 << 20)
# The upper bound for what decides the order of sums: another one gives other bits.
MOST_ORDERED_ELEMENTS = 3 << 19


def attention_delta(out: Tensor, dout: Tensor) -> Tensor:
    """Sum out * dout over D: what backward subtracts from the gradient of each weight.

    Args:
        out: [B, H, S, D] output of attention over the whole route.
        dout: [B, H, S, D] its gradient.

    Returns:
        [B, H, S] in fp32, or in fp64 for fp64 inputs.
    """
    if out.device.type in KERNEL_DEVICES and out.dtype != torch.float64:
        from biroute.model.attention.block_sparse.attention import output_delta

        return output_delta(out, dout)
    # One head at a time in one buffer: the product of whole tensors would cost as much memory as the output.
    product_BSD = torch.empty_like(out[:, 0], dtype=working_dtype(out))
    heads = [product_BSD.copy_(out[:, h]).mul_(dout[:, h]).sum(-1) for h in range(out.shape[1])]
    return torch.stack(heads, 1)


def merge_partials(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Combine attention over disjoint sets of keys to attention over their union; differentiable.

    Args:
        outs: [B, H, S, D] each.
        lses: [B, H, S] each, the log-sum-exps.

    Returns:
        The output [B, H, S, D] in the dtype of the log-sum-exps, and its log-sum-exp [B, H, S].
    """
    lse = torch.stack(lses).logsumexp(0)
    offset = lse.detach().masked_fill(lse == -torch.inf, 0.0)
    weights = [(part - offset).exp() for part in lses]
    total = torch.stack(weights).sum(0)
    total = total.masked_fill(total == 0, 1.0)
    merged = sum((out.to(lse.dtype) * (w / total)[..., None] for out, w in zip(outs, weights, strict=True)), 0.0)
    return torch.as_tensor(merged), lse


def merge_weights(lse: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weigh two parts over disjoint sets of keys, by their log-sum-exps.

    Returns:
        The weight of each part and the log-sum-exp of both; 0, 0 and -inf where neither has a visible key.
    """
    # exp and log: logaddexp and exp2 round an element differently by its place in a tensor.
    highest = torch.maximum(lse, part_lse)
    highest.masked_fill_(highest == -torch.inf, 0.0)
    weight, part_weight = ((x - highest).exp_() for x in (lse, part_lse))
    total = weight + part_weight
    merged = highest + total.log()
    total.masked_fill_(total == 0, 1.0)
    return weight / total, part_weight / total, merged


@torch.no_grad()
def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, route: Tensor, grid: RegionGrid, *, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Attend every query block to those regions of its route that k and v hold.

    Args:
        q: [B, H, S, D].
        k: [B, G, Sk, D].
        v: [B, G, Sk, D].
        route: [B, G, S // Lq, K] regions of k, ascending, -1 = empty.
        grid: sizes, causality and scale. If causal, S = Sk and the route of every block contains its own region;
            otherwise S and Sk need not be related.
        out_dtype: of the output; left out: q's.

    Returns:
        The output [B, H, S, D] and its log-sum-exp [B, H, S]; 0 and -inf for a query without a route.
    """
    if uses_kernels(grid, q):
        from biroute.model.attention.block_sparse.attention import sparse_attention

        return sparse_attention(q, k, v, route, grid, out_dtype=out_dtype)
    out = torch.empty_like(q, dtype=out_dtype, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:3], dtype=working_dtype(q))
    setting = _setting(grid, q, k, route, q)
    for b, g in product(range(k.shape[0]), range(k.shape[1])):
        heads = _heads(q, k, g)
        _group_forward(q[b, heads], k[b, g], v[b, g], route[b, g], out[b, heads], lse[b, heads], setting)
    return out, lse


def _group_forward(
    q_rSD: Tensor,
    k_SD: Tensor,
    v_SD: Tensor,
    route_NK: Tensor,
    out_rSD: Tensor,
    lse_rS: Tensor,
    setting: _Setting,
) -> None:
    """Write the output and the log-sum-exp of one key/value head of one sequence."""
    grid, work, heads_at_once, _ = setting
    plan = _plan(route_NK, k_SD, setting)
    k_RLD, v_RLD = (x.unflatten(0, (-1, grid.region_size)) for x in (k_SD, v_SD))
    for first in range(0, q_rSD.shape[0], heads_at_once):
        heads = slice(first, first + heads_at_once)
        q_rNMD, out_rNMD, lse_rNM = (
            x[heads].unflatten(1, (-1, grid.query_block_size)) for x in (q_rSD, out_rSD, lse_rS)
        )
        sum_rNM, offset_rNM = torch.zeros_like(lse_rNM), torch.zeros_like(lse_rNM)
        sum_rNMD = accumulator(out_rNMD, overwritten=plan.band is not None)
        _forward(plan, Inputs(q_rNMD, k_RLD, v_RLD, offset_rNM, grid.scale), sum_rNMD, sum_rNM, work)
        lse_rNM.copy_((offset_rNM + sum_rNM.log2()) / LOG2_E)
        sum_rNMD /= sum_rNM.masked_fill_(sum_rNM == 0, 1.0)[..., None]
        store(sum_rNMD, out_rNMD)


@torch.no_grad()
def partial_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    route: Tensor,
    grid: RegionGrid,
    *,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what the regions in k and v contribute to the gradients of attention over a whole route.

    Args:
        q, k, v, route, grid: as for `partial_attention`.
        dout: [B, H, S, D] gradient of the output of the whole route.
        lse: [B, H, S] log-sum-exp over the whole route.
        delta: [B, H, S] `attention_delta` of the whole route.
        out_dtype: of the gradients; left out: those of q, k and v.

    Returns:
        dq, dk, dv, shaped like q, k and v.
    """
    if uses_kernels(grid, q):
        from biroute.model.attention.block_sparse.attention import sparse_attention_backward

        return sparse_attention_backward(q, k, v, route, grid, dout=dout, lse=lse, delta=delta, out_dtype=out_dtype)
    dq, dk, dv = (torch.empty_like(x, dtype=out_dtype, memory_format=torch.contiguous_format) for x in (q, k, v))
    setting = _setting(grid, q, k, route, q, dout)
    for b, g in product(range(k.shape[0]), range(k.shape[1])):
        heads = _heads(q, k, g)
        inputs = _Backward(q[b, heads], dout[b, heads], lse[b, heads], delta[b, heads], k[b, g], v[b, g])
        _group_backward(inputs, route[b, g], dq[b, heads], dk[b, g], dv[b, g], setting)
    return dq, dk, dv


class _Backward(NamedTuple):
    """What backward of one key/value head of one sequence reads."""

    q: Tensor  # [r, S, D]
    dout: Tensor  # [r, S, D]
    lse: Tensor  # [r, S]
    delta: Tensor  # [r, S]
    k: Tensor  # [Sk, D]
    v: Tensor  # [Sk, D]


def _group_backward(
    given: _Backward,
    route_NK: Tensor,
    dq_rSD: Tensor,
    dk_SD: Tensor,
    dv_SD: Tensor,
    setting: _Setting,
) -> None:
    """Write the gradients of one key/value head of one sequence."""
    grid, work, heads_at_once, _ = setting
    plan = _plan(route_NK, given.k, setting)
    k_RLD, v_RLD, dk_RLD, dv_RLD = (x.unflatten(0, (-1, grid.region_size)) for x in (given.k, given.v, dk_SD, dv_SD))
    sum_dk_RLD, sum_dv_RLD = accumulator(dk_RLD), accumulator(dv_RLD)
    for first in range(0, dq_rSD.shape[0], heads_at_once):
        heads = slice(first, first + heads_at_once)
        q_rNMD, dout_rNMD, lse_rNM, delta_rNM, dq_rNMD = (
            x[heads].unflatten(1, (-1, grid.query_block_size)) for x in (*given[:4], dq_rSD)
        )
        offset_rNM = lse_rNM.masked_fill(lse_rNM == -torch.inf, 0.0) * LOG2_E
        inputs, upstream = Inputs(q_rNMD, k_RLD, v_RLD, offset_rNM, grid.scale), Upstream(dout_rNMD, delta_rNM)
        sum_dq_rNMD = accumulator(dq_rNMD, overwritten=plan.band is not None)
        grads = Gradients(sum_dq_rNMD, sum_dk_RLD, sum_dv_RLD)
        if plan.band is not None:
            band_backward(plan.band, inputs, upstream, grads, work)
        tiles_backward(plan.tiles, inputs, upstream, grads, work)
        store(sum_dq_rNMD, dq_rNMD)
    store(sum_dk_RLD, dk_RLD)
    store(sum_dv_RLD, dv_RLD)


def working_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that sums are computed in: fp64 for fp64, fp32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _Setting(NamedTuple):
    """How a key/value head is computed."""

    grid: RegionGrid
    work: Workspace
    heads_at_once: int  # query heads that are processed together
    large_route: bool  # whether sorting the route takes memory that counts


def _setting(grid: RegionGrid, q: Tensor, k: Tensor, route: Tensor, *tensors: Tensor) -> _Setting:
    # The buffers take no more memory than fits into the cache; and together with the route (8 bytes for each slot) no
    # more than half of the queries' own memory, a quarter if there are fp32 sums. A route takes as much again while
    # it is sorted: `_plan` gives the buffers back before it sorts a large one.
    dtype = working_dtype(q)
    allowed = q.nbytes // (2 if q.dtype == dtype else 4)
    least, most = CHUNK_ELEMENTS

    def fitting(beside: int, most: int) -> int:
        return min(max(max(allowed - beside, q.nbytes // 8) // dtype.itemsize, least), most)

    ordered = fitting(2 * route.nbytes, min(most, MOST_ORDERED_ELEMENTS))
    work = Workspace(fitting(route.nbytes, most), ordered, dtype)
    # All query heads are processed together where the tensors are contiguous in the working precision. Otherwise they
    # are copied, and only as many are taken as make the copies a fraction of the queries' memory.
    rep = q.shape[1] // k.shape[1]
    direct = all(x.is_contiguous() and x.dtype == dtype for x in tensors)
    heads = rep if direct else max(1, q.shape[0] * q.shape[1] // (4 if q.dtype == dtype else 8))
    heads_at_once = max(n for n in range(1, rep + 1) if rep % n == 0 and n <= heads)
    return _Setting(grid, work, heads_at_once, 16 * route.nbytes > q.nbytes)


def _heads(q: Tensor, k: Tensor, group: int) -> slice:
    """Return the query heads of key/value head `group`."""
    rep = q.shape[1] // k.shape[1]
    return slice(group * rep, (group + 1) * rep)


def accumulator(x: Tensor, overwritten: bool = False) -> Tensor:
    """Return zeros to sum into: x itself, or a tensor of the working precision that `store` copies to x.

    `overwritten`: the band writes every row before anything is added to it, so nothing need be cleared.
    """
    if x.dtype == working_dtype(x):
        return x if overwritten else x.zero_()
    return (torch.empty_like if overwritten else torch.zeros_like)(x, dtype=working_dtype(x))


def store(total: Tensor, x: Tensor) -> None:
    """Write the finished sum, which `accumulator(x)` returned, to x."""
    if total is not x:
        x.copy_(total)


@dataclass(frozen=True)
class _Plan:
    """The route of one key/value head, cut into a dense band and tiles."""

    band: Band | None
    tiles: list[Tiles]


def _forward(plan: _Plan, x: Inputs, out_rNMD: Tensor, sum_rNM: Tensor, work: Workspace) -> None:
    """Add weights and weighted values to sums that are zero, and write the softmax offset."""
    if plan.band is None:
        max_rNM = tiles_max(plan.tiles, x, work)
        x.softmax_offset.copy_(max_rNM.masked_fill_(max_rNM == -torch.inf, 0.0))
    else:
        band_forward(plan.band, x, out_rNMD, sum_rNM, work)
    tiles_forward(plan.tiles, x, out_rNMD, sum_rNM, work)
    overflow_rNM = ~(sum_rNM < LARGEST_SUM)
    if plan.band is None or not overflow_rNM.any():
        return
    # Compute it again, with the exact maximum only in rows that overflow, so no row's bits depend on another row.
    max_rNM = tiles_max(plan.tiles, x, work)
    new_offset_rNM = torch.where(overflow_rNM, torch.maximum(x.softmax_offset, max_rNM), x.softmax_offset)
    band_forward(plan.band, x, out_rNMD, sum_rNM, work)
    factor_rNM = ((x.softmax_offset - new_offset_rNM) / LOG2_E).exp_()  # exp, not exp2: see `powers_`
    out_rNMD *= factor_rNM[..., None]
    sum_rNM *= factor_rNM
    x.softmax_offset.copy_(new_offset_rNM)
    tiles_forward(plan.tiles, x, out_rNMD, sum_rNM, work)


def _plan(route_NK: Tensor, k_SD: Tensor, setting: _Setting) -> _Plan:
    grid, work, heads, large_route = setting
    if large_route:
        work.release()
    key_tokens, head_size = k_SD.shape
    route_NK = route_NK.int()  # half the memory
    band, rest_NK = _plan_band(route_NK, key_tokens, grid, work.dtype)
    if not use_region_major(setting, route_NK.shape[1], head_size):
        return _Plan(band, query_major_tiles(rest_NK))
    blocks_per_tile = max(1, ROWS_PER_TILE // (grid.query_block_size * heads))
    return _Plan(band, region_major_tiles(rest_NK, key_tokens // grid.region_size, blocks_per_tile))


def use_region_major(setting: _Setting, topk: int, head_size: int) -> bool:
    """Decide between the two kinds of tiles: the rule of `path="auto"` on the CPU.

    It gathers whichever is smaller: a block's query rows (region-major) or a region's keys (query-major). It also
    takes region-major where a block with all its regions would be too large a tile.

    Args:
        setting: the path if one is named, sizes, and the elements of the largest tile.
        topk: K.
        head_size: D.

    Returns:
        True for region-major, False for query-major.
    """
    grid, work, heads, _ = setting
    if grid.path != "auto":
        return grid.path == "region_major"
    rows = grid.query_block_size * heads
    return rows < grid.region_size or tile_elements(rows, topk * grid.region_size, head_size) > work.ordered_elements


def _plan_band(route_NK: Tensor, key_tokens: int, grid: RegionGrid, dtype: torch.dtype) -> tuple[Band | None, Tensor]:
    """Return the dense part of a route, and the rest of the route (-1 in the slots that the band covers).

    If causal, the band is the same whatever was chosen, so that no token's bits depend on the choice of another one.
    """
    num_blocks, topk = route_NK.shape
    num_regions = key_tokens // grid.region_size
    own_N = grid.own_region(num_blocks, route_NK.device).int()
    is_own_NK = route_NK == own_N[:, None]
    is_previous_NK = (route_NK == own_N[:, None] - 1) & (route_NK >= 0)
    has_previous_N = is_previous_NK.any(-1) | (own_N == 0)
    all_previous = bool(has_previous_N.all())
    same_tokens = grid.same_tokens and num_blocks * grid.query_block_size == key_tokens
    if not grid.causal and not (same_tokens and bool(is_own_NK.any(-1).all())):
        return None, route_NK
    width = 2 if topk > 1 and num_regions > 1 and (grid.causal or all_previous) else 1
    own_bias_LL = previous_bias = None
    if grid.causal:
        token_L = torch.arange(grid.region_size, device=route_NK.device)
        later_LL = token_L > token_L[:, None]
        own_bias_LL = torch.zeros_like(later_LL, dtype=dtype).masked_fill_(later_LL, -torch.inf)
        if width == 2 and not all_previous:
            bias_N = torch.zeros_like(own_N, dtype=dtype).masked_fill_(~has_previous_N, -torch.inf)
            previous_bias = bias_N.view(num_regions, -1)
    in_band_NK = is_own_NK | is_previous_NK if width == 2 else is_own_NK
    if grid.causal:
        in_band_NK |= route_NK > own_N[:, None]  # later regions are masked as a whole
    return Band(width, own_bias_LL, previous_bias), route_NK.masked_fill(in_band_NK, -1)
