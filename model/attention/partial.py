"""Attention over any set of key regions, forward and backward: the seam for regions sharded across ranks.

`partial_attention` gives the output and log-sum-exp over the regions it is handed, `merge_partials` joins such parts,
and `partial_attention_backward` takes the log-sum-exp and delta of the *whole* route. Queries and regions may be any
number, so the same functions serve a rank's own regions, regions fetched from others and queries shipped by others.

One key/value head of one sequence after the other, in chunks, straight from and into the tensors as they lie. The
route is cut into a dense band (`band.py`: the own region and the one before) and tiles (`tiles.py`: everything
else). All weights of a query are taken relative to one level, the largest exponent in its band, so partial sums add
up without rescaling; a row that would overflow gets its exact maximum instead. Backward recomputes the weights.

Legend: B batch, H query heads, G key/value heads, r heads of a group, S query tokens, Sk key tokens, D head size, L
region size, X regions, Lq query block size, N query blocks, M tokens of a block, u blocks of a region, T slots of a
route.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from biroute.model.attention.band import Band, band_backward, band_forward
from biroute.model.attention.grid import RegionGrid, uses_kernels
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
# Query rows of a region-major tile: enough for the products' full speed, few enough to waste little on padding.
ROWS_PER_TILE = 128
# Bounds of a chunk's buffers in elements: few enough to stay in cache, enough to hide the cost of a call.
CHUNK_ELEMENTS = (1 << 17, 3 << 19)


def attention_delta(out: Tensor, dout: Tensor) -> Tensor:
    """Sum over D of out * dout: [B, H, S, D] twice -> [B, H, S] in fp32 (fp64 for fp64)."""
    if out.device.type == "cuda" and out.dtype != torch.float64:
        from biroute.model.attention.block_sparse.attention import output_delta

        return output_delta(out, dout)
    # One head at a time in one buffer: the product of whole tensors would cost as much memory as the output.
    product_BSD = torch.empty_like(out[:, 0], dtype=working_dtype(out))
    heads = [product_BSD.copy_(out[:, h]).mul_(dout[:, h]).sum(-1) for h in range(out.shape[1])]
    return torch.stack(heads, 1)


def merge_partials(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys from attention over each.

    outs [B, H, S, D], lses [B, H, S] -> output in the dtype of the log-sum-exps, and its log-sum-exp. Differentiable.
    """
    lse = torch.stack(lses).logsumexp(0)
    level = lse.detach().masked_fill(lse == -torch.inf, 0.0)
    weights = [(part - level).exp() for part in lses]
    total = torch.stack(weights).sum(0)
    total = total.masked_fill(total == 0, 1.0)
    merged = sum((out.to(lse.dtype) * (w / total)[..., None] for out, w in zip(outs, weights, strict=True)), 0.0)
    return torch.as_tensor(merged), lse


@torch.no_grad()
def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, grid: RegionGrid, *, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the regions in k and v.

    q [B, H, S, D], k, v [B, G, Sk, D], index [B, G, S // Lq, T] of regions in k, ascending, -1 = empty -> out
    [B, H, S, D] in `out_dtype` (left out: q's) and its log-sum-exp [B, H, S] (0 and -inf for a query without a
    route). If causal, S = Sk and every block's own region is in its route; otherwise S and Sk need not be related.
    """
    if uses_kernels(grid, q):
        from biroute.model.attention.block_sparse.attention import sparse_attention

        return sparse_attention(q, k, v, index, grid, out_dtype=out_dtype)
    out = torch.empty_like(q, dtype=out_dtype, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:3], dtype=working_dtype(q))
    setting = _setting(grid, q, k, index, q)
    for b, g in product(range(k.shape[0]), range(k.shape[1])):
        heads = _heads(q, k, g)
        _group_forward(q[b, heads], k[b, g], v[b, g], index[b, g], out[b, heads], lse[b, heads], setting)
    return out, lse


def _group_forward(
    q_rSD: Tensor,
    k_SD: Tensor,
    v_SD: Tensor,
    index_NT: Tensor,
    out_rSD: Tensor,
    lse_rS: Tensor,
    setting: _Setting,
) -> None:
    """Write the output and the log-sum-exp of one key/value head of one sequence."""
    grid, work, heads_at_once = setting
    plan = _plan(index_NT, k_SD, setting)
    k_XLD, v_XLD = (x.unflatten(0, (-1, grid.region_size)) for x in (k_SD, v_SD))
    for first in range(0, q_rSD.shape[0], heads_at_once):
        heads = slice(first, first + heads_at_once)
        q_rNMD, out_rNMD, lse_rNM = (
            x[heads].unflatten(1, (-1, grid.query_block_size)) for x in (q_rSD, out_rSD, lse_rS)
        )
        sum_rNM, level_rNM = torch.zeros_like(lse_rNM), torch.zeros_like(lse_rNM)
        sum_rNMD = accumulator(out_rNMD)
        _forward(plan, Inputs(q_rNMD, k_XLD, v_XLD, level_rNM, grid.scale), sum_rNMD, sum_rNM, work)
        lse_rNM.copy_((level_rNM + sum_rNM.log2()) / LOG2_E)
        sum_rNMD /= sum_rNM.masked_fill_(sum_rNM == 0, 1.0)[..., None]
        store(sum_rNMD, out_rNMD)


@torch.no_grad()
def partial_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    grid: RegionGrid,
    *,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The share of the regions in k and v in the gradients of attention over a whole route.

    `lse` [B, H, S] is the log-sum-exp over the whole route, `delta` [B, H, S] the sum over D of its output times its
    gradient `dout` (see `attention_delta`) -> dq, dk, dv, shaped like q, k and v, in `out_dtype` (left out: theirs).
    """
    if uses_kernels(grid, q):
        from biroute.model.attention.block_sparse.attention import sparse_attention_backward

        return sparse_attention_backward(q, k, v, index, grid, dout=dout, lse=lse, delta=delta, out_dtype=out_dtype)
    dq, dk, dv = (torch.empty_like(x, dtype=out_dtype, memory_format=torch.contiguous_format) for x in (q, k, v))
    setting = _setting(grid, q, k, index, q, dout)
    for b, g in product(range(k.shape[0]), range(k.shape[1])):
        heads = _heads(q, k, g)
        inputs = _Backward(q[b, heads], dout[b, heads], lse[b, heads], delta[b, heads], k[b, g], v[b, g])
        _group_backward(inputs, index[b, g], dq[b, heads], dk[b, g], dv[b, g], setting)
    return dq, dk, dv


class _Backward(NamedTuple):
    """What backward of one key/value head of one sequence reads."""

    q: Tensor  # [rSD]
    dout: Tensor  # [rSD]
    lse: Tensor  # [rS]
    delta: Tensor  # [rS]
    k: Tensor  # [SD]
    v: Tensor  # [SD]


def _group_backward(
    given: _Backward,
    index_NT: Tensor,
    dq_rSD: Tensor,
    dk_SD: Tensor,
    dv_SD: Tensor,
    setting: _Setting,
) -> None:
    """Write the gradients of one key/value head of one sequence."""
    grid, work, heads_at_once = setting
    plan = _plan(index_NT, given.k, setting)
    k_XLD, v_XLD, dk_XLD, dv_XLD = (x.unflatten(0, (-1, grid.region_size)) for x in (given.k, given.v, dk_SD, dv_SD))
    sum_dk_XLD, sum_dv_XLD = accumulator(dk_XLD), accumulator(dv_XLD)
    for first in range(0, dq_rSD.shape[0], heads_at_once):
        heads = slice(first, first + heads_at_once)
        q_rNMD, do_rNMD, lse_rNM, delta_rNM, dq_rNMD = (
            x[heads].unflatten(1, (-1, grid.query_block_size)) for x in (*given[:4], dq_rSD)
        )
        level_rNM = lse_rNM.masked_fill(lse_rNM == -torch.inf, 0.0) * LOG2_E
        inputs, upstream = Inputs(q_rNMD, k_XLD, v_XLD, level_rNM, grid.scale), Upstream(do_rNMD, delta_rNM)
        sum_dq_rNMD = accumulator(dq_rNMD)
        grads = Gradients(sum_dq_rNMD, sum_dk_XLD, sum_dv_XLD)
        if plan.band is not None:
            band_backward(plan.band, inputs, upstream, grads, work)
        tiles_backward(plan.tiles, inputs, upstream, grads, work)
        store(sum_dq_rNMD, dq_rNMD)
    store(sum_dk_XLD, dk_XLD)
    store(sum_dv_XLD, dv_XLD)


def working_dtype(x: Tensor) -> torch.dtype:
    """fp32 for everything but fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _Setting(NamedTuple):
    """How the groups are computed: sizes, buffers, and the heads of a group that are taken together."""

    grid: RegionGrid
    work: Workspace
    heads_at_once: int


def _setting(grid: RegionGrid, q: Tensor, k: Tensor, index: Tensor, *tensors: Tensor) -> _Setting:
    # Together with the route (8 bytes for each slot, and as much while it is sorted) no more than half of the
    # queries' own memory (a quarter, if sums in fp32 come on top), and no more than fits into the cache.
    dtype = working_dtype(q)
    share = q.nbytes // (2 if q.dtype == dtype else 4)
    elements = max(share - 2 * index.nbytes, q.nbytes // 8) // dtype.itemsize
    work = Workspace(min(max(elements, CHUNK_ELEMENTS[0]), CHUNK_ELEMENTS[1]), dtype)
    # All heads at once; or, where tensors do not lie head by head in the working precision, so few that copies of
    # them take no more than a fraction of the queries' memory.
    rep = q.shape[1] // k.shape[1]
    direct = all(x.is_contiguous() and x.dtype == dtype for x in tensors)
    most = rep if direct else max(1, q.shape[0] * q.shape[1] // (4 if q.dtype == dtype else 8))
    return _Setting(grid, work, max(n for n in range(1, rep + 1) if rep % n == 0 and n <= most))


def _heads(q: Tensor, k: Tensor, group: int) -> slice:
    """The query heads of a key/value head."""
    rep = q.shape[1] // k.shape[1]
    return slice(group * rep, (group + 1) * rep)


def accumulator(x: Tensor) -> Tensor:
    """Zeros to sum into: x itself, or a tensor of the working precision that `store` copies back."""
    return x.zero_() if x.dtype == working_dtype(x) else torch.zeros_like(x, dtype=working_dtype(x))


def store(total: Tensor, x: Tensor) -> None:
    """Write a finished sum of `accumulator(x)` to x."""
    if total is not x:
        x.copy_(total)


@dataclass(frozen=True)
class _Plan:
    """The route of one key/value head, cut into a dense band and tiles."""

    band: Band | None
    tiles: list[Tiles]


def _forward(plan: _Plan, x: Inputs, out_rNMD: Tensor, sum_rNM: Tensor, work: Workspace) -> None:
    """Sum weights and weighted values into zeros, and write the level."""
    if plan.band is None:
        most_rNM = tiles_max(plan.tiles, x, work)
        x.level.copy_(most_rNM.masked_fill_(most_rNM == -torch.inf, 0.0))
    else:
        band_forward(plan.band, x, out_rNMD, sum_rNM, work)
    tiles_forward(plan.tiles, x, out_rNMD, sum_rNM, work)
    overflow_rNM = ~(sum_rNM < LARGEST_SUM)
    if plan.band is None or not overflow_rNM.any():
        return
    # Once more, with the exact maximum where it is needed: row by row, so that no row's bits depend on another one.
    most_rNM = tiles_max(plan.tiles, x, work)
    higher_rNM = torch.where(overflow_rNM, torch.maximum(x.level, most_rNM), x.level)
    band_forward(plan.band, x, out_rNMD, sum_rNM, work)
    factor_rNM = ((x.level - higher_rNM) / LOG2_E).exp_()  # exp, not exp2: see `powers_`
    out_rNMD *= factor_rNM[..., None]
    sum_rNM *= factor_rNM
    x.level.copy_(higher_rNM)
    tiles_forward(plan.tiles, x, out_rNMD, sum_rNM, work)


def _plan(index_NT: Tensor, k_SD: Tensor, setting: _Setting) -> _Plan:
    grid, work, heads = setting
    key_tokens, head_size = k_SD.shape
    index_NT = index_NT.int()  # half the memory
    band, routed_NT = _plan_band(index_NT, key_tokens, grid, work.dtype)
    if not use_region_major(setting, index_NT.shape[1], head_size):
        return _Plan(band, query_major_tiles(routed_NT))
    blocks_per_tile = max(1, ROWS_PER_TILE // (grid.query_block_size * heads))
    return _Plan(band, region_major_tiles(routed_NT, key_tokens // grid.region_size, blocks_per_tile))


def use_region_major(setting: _Setting, topk: int, head_size: int) -> bool:
    """The rule of `path="auto"`: gather whichever is smaller, a block's query rows (region-major) or a region's keys
    (query-major); and region-major where a block with all its regions would not fit into the buffers."""
    grid, work, heads = setting
    if grid.path != "auto":
        return grid.path == "region_major"
    rows = grid.query_block_size * heads
    return rows < grid.region_size or tile_elements(rows, topk * grid.region_size, head_size) > work.elements


def _plan_band(index_NT: Tensor, key_tokens: int, grid: RegionGrid, dtype: torch.dtype) -> tuple[Band | None, Tensor]:
    """The dense part of a route, and the index of the rest (with -1 anywhere).

    Causal: always the same part, whatever was chosen, so that no token's bits depend on the choice of another one.
    """
    num_blocks, topk = index_NT.shape
    num_regions = key_tokens // grid.region_size
    own_N = grid.own_region(num_blocks, index_NT.device).int()
    is_own_NT = index_NT == own_N[:, None]
    is_previous_NT = (index_NT == own_N[:, None] - 1) & (index_NT >= 0)
    has_previous_N = is_previous_NT.any(-1) | (own_N == 0)
    all_previous = bool(has_previous_N.all())
    same_tokens = grid.same_tokens and num_blocks * grid.query_block_size == key_tokens
    if not grid.causal and not (same_tokens and bool(is_own_NT.any(-1).all())):
        return None, index_NT
    width = 2 if topk > 1 and num_regions > 1 and (grid.causal or all_previous) else 1
    own_bias_LL = previous_bias_Xu = None
    if grid.causal:
        token_L = torch.arange(grid.region_size, device=index_NT.device)
        later_LL = token_L > token_L[:, None]
        own_bias_LL = torch.zeros_like(later_LL, dtype=dtype).masked_fill_(later_LL, -torch.inf)
        if width == 2 and not all_previous:
            bias_N = torch.zeros_like(own_N, dtype=dtype).masked_fill_(~has_previous_N, -torch.inf)
            previous_bias_Xu = bias_N.view(num_regions, -1)
    dense_NT = is_own_NT | is_previous_NT if width == 2 else is_own_NT
    if grid.causal:
        dense_NT |= index_NT > own_N[:, None]  # a later region holds nothing that may be seen
    return Band(width, own_bias_LL, previous_bias_Xu), index_NT.masked_fill(dense_NT, -1)
