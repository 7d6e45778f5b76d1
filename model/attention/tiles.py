"""Level two over a route, as tiles: a few query blocks times a few regions, each tile one dense product.

The two fast paths are two ways to cut the same (query block, region) pairs into tiles:

- *query-major*: one query block and all its regions. Gathers keys and values; for blocks of many query rows.
- *region-major*: one region and a fixed number of the blocks that chose it. Gathers queries and adds their results
  back; for blocks of few query rows. Visitors come in ascending order and every tile has the same shape, so what
  later tokens choose moves no earlier row inside its tile. Spare places hold block 0 with a level of +inf: weight 0.

No tile holds a masked pair: the own region and the one before it are not routed through tiles (see `band.py`).
The heads of a group share their tiles: head h of block i is item h * N + i of the tables. Everything here works on
one key/value head of one sequence and reads the tensors where they lie. Weights are powers of 2.

Legend: r heads of a group, N query blocks, Q = r * N items, M tokens of a block, X regions, L region size, D head
size, n tiles of a chunk, T query blocks of a tile (of all heads, once spread), c regions of a tile, P (block, region)
pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)
ELEMENTS_OF_VECTORS = 64  # a multiple of what exp2 takes at once on any CPU


class Tiles(NamedTuple):
    """Tiles of one shape: query blocks [n, T], regions [n, c], and True where a place is spare [n, T] (or None)."""

    blocks: Tensor
    regions: Tensor
    spare: Tensor | None = None

    def chunks(self, tiles_per_chunk: int, heads: int, num_blocks: int) -> Iterator[Tiles]:
        """A few tiles at a time, spread over the heads: items of the tables instead of blocks."""
        # int64 at last: index_add_ is several times slower with int32.
        head_r1 = torch.arange(heads, device=self.blocks.device)[:, None] * num_blocks
        for start in range(0, self.blocks.shape[0], tiles_per_chunk):
            part = slice(start, start + tiles_per_chunk)
            spare_nT = None if self.spare is None else self.spare[part].repeat(1, heads)
            yield Tiles((self.blocks[part, None] + head_r1).flatten(1), self.regions[part].long(), spare_nT)

    def minus(self, x_QM: Tensor) -> Tensor:
        """Minus the entries of the tiles' query rows: [Q, M] -> [n, T * M, 1]."""
        rows = x_QM.squeeze(1).index_select(0, self.blocks.reshape(-1)).neg_()
        return rows.view(self.blocks.shape[0], -1, 1)

    def minus_levels(self, level_QM: Tensor) -> Tensor:
        """`minus`, but -inf at spare places: there every weight is 0."""
        level_n = self.minus(level_QM)
        if self.spare is not None:
            level_n.view(self.spare.numel(), -1).masked_fill_(self.spare.view(-1, 1), -torch.inf)
        return level_n


def query_major_tiles(routed_NT: Tensor) -> list[Tiles]:
    """routed [N, topk], -1 = empty (anywhere) -> one tile for each block with a route, grouped by length of route."""
    routed_NT = routed_NT.sort(dim=-1, descending=True).values  # the empty slots last
    length_N = (routed_NT >= 0).sum(-1)
    tiles = []
    for length in length_N.unique().tolist():
        if length:
            blocks = (length_N == length).nonzero()
            tiles.append(Tiles(blocks, routed_NT[blocks[:, 0], :length].flip(-1)))
    return tiles


def region_major_tiles(routed_NT: Tensor, num_regions: int, blocks_per_tile: int) -> list[Tiles]:
    """routed [N, topk], -1 = empty (anywhere) -> tiles of `blocks_per_tile` visitors, region after region."""
    region_P, order_P = routed_NT.flatten().sort(stable=True)
    empty = int((region_P < 0).sum())
    if empty == region_P.numel():
        return []
    region_P, block_P = region_P[empty:], order_P[empty:].div_(routed_NT.shape[1], rounding_mode="floor").int()
    del order_P  # one number for each pair is much, at Lq = 1
    visitors_X = torch.bincount(region_P, minlength=num_regions)
    tiles_X = (visitors_X + blocks_per_tile - 1) // blocks_per_tile
    # Where a region's first visitor sits in the padded list, minus where it sits in the sorted one.
    shift_X = (tiles_X.cumsum(0) - tiles_X) * blocks_per_tile - (visitors_X.cumsum(0) - visitors_X)
    place_P = shift_X.index_select(0, region_P).add_(torch.arange(region_P.numel(), device=region_P.device))
    blocks_nT = block_P.new_full((int(tiles_X.sum()), blocks_per_tile), -1)
    blocks_nT.view(-1).scatter_(0, place_P, block_P)
    regions_n = torch.arange(num_regions, device=region_P.device, dtype=torch.int32).repeat_interleave(tiles_X)
    return [Tiles(blocks_nT.clamp(min=0), regions_n[:, None], blocks_nT < 0)]


def tile_elements(rows: int, keys: int, head_size: int) -> int:
    """Elements of the buffers that backward of one tile takes."""
    return 2 * rows * keys + (3 * rows + 4 * keys) * head_size


class Workspace:
    """Buffers that every chunk uses again: fresh ones cost more in page faults than the gathers themselves."""

    def __init__(self, elements: int, dtype: torch.dtype) -> None:
        self.elements, self.dtype = elements, dtype
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor; the next one of the same name takes its memory."""
        size = math.prod(shape)
        key = (name, like.dtype)
        if key not in self.buffers or self.buffers[key].numel() < size:
            self.buffers[key] = like.new_empty(size)
        return self.buffers[key][:size].view(shape)

    def cast(self, name: str, x: Tensor) -> Tensor:
        """x itself, or a copy of it in the working precision."""
        if x.dtype == self.dtype:
            return x
        return self.take(name, x.shape, x.new_empty(0, dtype=self.dtype)).copy_(x)

    def gather(self, name: str, table: Tensor, numbers_nm: Tensor) -> Tensor:
        """table [items, rows, D], numbers [n, m] -> [n, m * rows, D] in the working precision."""
        out = self.take(name, (numbers_nm.numel(), *table.shape[1:]), table)
        torch.index_select(table, 0, numbers_nm.reshape(-1), out=out)
        return self.cast(name, out.view(numbers_nm.shape[0], -1, table.shape[2]))

    def product(
        self, name: str, a_n: Tensor, b_n: Tensor, factor: float = 1.0, summand: Tensor | None = None
    ) -> Tensor:
        """factor * a [n, i, j] @ b [n, j, k] + summand (broadcast) -> [n, i, k]."""
        out = self.take(name, (*a_n.shape[:2], b_n.shape[2]), a_n)
        if summand is None:
            return out.baddbmm_(a_n, b_n, beta=0, alpha=factor)
        # The product would clear its output anyway: so the sum costs nothing.
        return out.copy_(summand).baddbmm_(a_n, b_n, alpha=factor)

    def chunks(self, tiles: list[Tiles], x: Inputs) -> Iterator[Tiles]:
        """Cut tiles so that a chunk's buffers hold about `self.elements` elements."""
        heads, num_blocks, tokens, head_size = x.q.shape
        for group in tiles:
            rows = heads * group.blocks.shape[1] * tokens
            keys = group.regions.shape[1] * x.k.shape[1]
            at_once = max(1, self.elements // tile_elements(rows, keys, head_size))
            yield from group.chunks(at_once, heads, num_blocks)


@dataclass(frozen=True)
class Inputs:
    """One key/value head of one sequence. Weights are 2 ** (scale * log2 e * q k - level)."""

    q: Tensor  # [r, N, M, D]
    k: Tensor  # [X, L, D]
    v: Tensor  # [X, L, D]
    level: Tensor  # [r, N, M]
    scale: float


@dataclass(frozen=True)
class Upstream:
    """The gradient of the output, and delta: what is subtracted from its products with the values."""

    dout: Tensor  # [r, N, M, D]
    delta: Tensor  # [r, N, M]


@dataclass(frozen=True)
class Gradients:
    """Sums that backward adds to."""

    dq: Tensor  # [r, N, M, D]
    dk: Tensor  # [X, L, D]
    dv: Tensor  # [X, L, D]


def tiles_max(tiles_of_group: list[Tiles], x: Inputs, work: Workspace) -> Tensor:
    """The largest exponent of each query row over the tiles -> [r, N, M], -inf where there is none."""
    most_rNM = torch.full_like(x.level, -torch.inf)
    q_QMD, rows = x.q.flatten(0, 1), x.q.shape[2]
    for tiles in work.chunks(tiles_of_group, x):
        k_n = work.gather("k", x.k, tiles.regions)
        q_n = work.gather("q", q_QMD, tiles.blocks)
        most = work.product("weight", q_n, k_n.transpose(1, 2), x.scale * LOG2_E).amax(-1).view(-1, rows)
        if tiles.spare is not None:
            most.masked_fill_(tiles.spare.view(-1, 1), -torch.inf)
        place = tiles.blocks.reshape(-1, 1).expand(-1, rows)
        most_rNM.view(-1, rows).scatter_reduce_(0, place, most, "amax")
    return most_rNM


def tiles_forward(tiles_of_group: list[Tiles], x: Inputs, out_rNMD: Tensor, sum_rNM: Tensor, work: Workspace) -> None:
    """Add the tiles' share of the unnormalised output and of the sum of weights."""
    q_QMD, level_QM = x.q.flatten(0, 1), x.level.flatten(0, 1)
    out_QMD, sum_QM = out_rNMD.flatten(0, 1), sum_rNM.flatten(0, 1)
    for tiles in work.chunks(tiles_of_group, x):
        k_n, v_n = work.gather("k", x.k, tiles.regions), work.gather("v", x.v, tiles.regions)
        q_n = work.gather("q", q_QMD, tiles.blocks)
        levels_n = tiles.minus_levels(level_QM)
        weight_n = powers_(work.product("weight", q_n, k_n.transpose(1, 2), x.scale * LOG2_E, levels_n))
        add_rows(sum_QM, tiles.blocks, weight_n.sum(-1))
        add_rows(out_QMD, tiles.blocks, work.product("out", weight_n, v_n))


def tiles_backward(tiles_of_group: list[Tiles], x: Inputs, up: Upstream, grads: Gradients, work: Workspace) -> None:
    """Recompute the weights of the tiles (the level is the log-sum-exp) and add to the gradients."""
    q_QMD, level_QM = x.q.flatten(0, 1), x.level.flatten(0, 1)
    do_QMD, delta_QM, dq_QMD = up.dout.flatten(0, 1), up.delta.flatten(0, 1), grads.dq.flatten(0, 1)
    for tiles in work.chunks(tiles_of_group, x):
        k_n, v_n = work.gather("k", x.k, tiles.regions), work.gather("v", x.v, tiles.regions)
        q_n, do_n = work.gather("q", q_QMD, tiles.blocks), work.gather("do", do_QMD, tiles.blocks)
        levels_n = tiles.minus_levels(level_QM)
        weight_n = powers_(work.product("weight", q_n, k_n.transpose(1, 2), x.scale * LOG2_E, levels_n))
        dscore_n = work.product("dscore", do_n, v_n.transpose(1, 2), summand=tiles.minus(delta_QM)).mul_(weight_n)
        dv_n = work.product("dv", weight_n.transpose(1, 2), do_n)
        dk_n = work.product("dk", dscore_n.transpose(1, 2), q_n, x.scale)
        dq_n = work.product("dq", dscore_n, k_n, x.scale)
        add_rows(dq_QMD, tiles.blocks, dq_n)
        add_rows(grads.dk, tiles.regions, dk_n)
        add_rows(grads.dv, tiles.regions, dv_n)


def powers_(exponent_nTK: Tensor) -> Tensor:
    """2 to the exponents of n tiles, in place: an element's bits do not depend on how many tiles there are.

    PyTorch's exp2 on the CPU rounds the last elements of a tensor, those that fill no vector, differently; exp does
    not, but is slower. So exp2 serves tiles of whole vectors only: a choice by the shape of one tile.
    """
    if exponent_nTK.shape[1:].numel() % ELEMENTS_OF_VECTORS:
        return exponent_nTK.mul_(1 / LOG2_E).exp_()
    return exponent_nTK.exp2_()


def add_rows(table: Tensor, numbers_nm: Tensor, x_n: Tensor) -> None:
    """Add x [n, m * rows, ...] to the contiguous table [items, rows, ...] at the items `numbers` [n, m]."""
    table = table.flatten(1).squeeze(1)
    table.index_add_(0, numbers_nm.reshape(-1), x_n.view(-1, *table.shape[1:]))
