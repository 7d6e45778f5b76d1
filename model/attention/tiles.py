"""Attention over a route, cut into tiles: a few query blocks times a few regions, each tile one dense product.

The two fast paths are two ways to cut the same (query block, region) pairs into tiles:

- *query-major*: a tile is one query block and all its regions. Keys and values are gathered. For blocks of many query
  rows.
- *region-major*: a tile is one region and a fixed number of the blocks that chose it. Queries are gathered, and the
  results are added back to their rows. For blocks of few query rows. The blocks of a region come in ascending order
  and all tiles have the same shape, so the choices of later tokens do not change the position of an earlier block in
  its tile. Padding fills up the tiles: it repeats block 0 with an infinite softmax offset, so its weights are 0.

No tile needs a causal mask: the own region and the one before it are not attended in tiles (see `band.py`).

Everything here works on one key/value head of one sequence and reads the tensors in place. The query heads of the
key/value head share its tiles: block i of head h is row h * N + i, an *item*, of the tables of queries and results.
Weights are powers of 2.

Shapes: r query heads of a key/value head, N query blocks, M tokens of a query block, R regions, L tokens of a region,
D head size, K slots of a route, U (query block, region) pairs, T tiles of a chunk, W regions of a tile. In loops over
chunks, tensors without a suffix begin with the dimension T, and their second dimension holds the tile's query rows or
keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)
ELEMENTS_OF_VECTORS = 64  # a multiple of the number of elements that exp2 processes together on any CPU


class Tiles(NamedTuple):
    """Tiles of one shape.

    Attributes:
        blocks: int [T, blocks of a tile]: query blocks; in the tiles that `chunks` yields, items of all heads.
        regions: int [T, W].
        padding: bool [T, blocks of a tile]: True where the entry is padding; None if there is no padding.
    """

    blocks: Tensor
    regions: Tensor
    padding: Tensor | None = None

    def chunks(self, tiles_per_chunk: int, heads: int, num_blocks: int) -> Iterator[Tiles]:
        """Yield `tiles_per_chunk` tiles at a time, with the items of all heads instead of the query blocks."""
        # Only the chunks are int64: index_add_ is several times slower with int32.
        first_item_r1 = torch.arange(heads, device=self.blocks.device)[:, None] * num_blocks
        for start in range(0, self.blocks.shape[0], tiles_per_chunk):
            part = slice(start, start + tiles_per_chunk)
            padding = None if self.padding is None else self.padding[part]
            yield Tiles((self.blocks[part, None] + first_item_r1).flatten(1), self.regions[part].long(), padding)

    def rows(self, x: Tensor) -> Tensor:
        """Gather the entries of the tiles' query rows: [r * N, M] -> [T, query rows, 1]."""
        return x.squeeze(1).index_select(0, self.blocks.reshape(-1)).view(self.blocks.shape[0], -1, 1)

    def offset_rows(self, negated_offset: Tensor) -> Tensor:
        """Do the same with negated softmax offsets, but give -inf in padding, so that its weights are 0."""
        offset = self.rows(negated_offset)
        if self.padding is not None:
            # [T, r, blocks of a tile, M]: the heads share the padding of their tile.
            by_head = offset.view(self.blocks.shape[0], -1, self.padding.shape[1], negated_offset.shape[1])
            by_head.masked_fill_(self.padding[:, None, :, None], -torch.inf)
        return offset


def query_major_tiles(route_NK: Tensor) -> list[Tiles]:
    """Make one tile of each query block that has a route.

    Args:
        route_NK: int [N, K] regions, -1 = empty (in any slot).

    Returns:
        Tiles, grouped by the number of their regions.
    """
    route_NK = route_NK.sort(dim=-1, descending=True).values  # the empty slots last
    length_N = (route_NK >= 0).sum(-1)
    tiles = []
    for length in length_N.unique().tolist():
        if length:
            blocks = (length_N == length).nonzero()
            tiles.append(Tiles(blocks, route_NK[blocks[:, 0], :length].flip(-1)))
    return tiles


def region_major_tiles(route_NK: Tensor, num_regions: int, blocks_per_tile: int) -> list[Tiles]:
    """Make tiles of one region and `blocks_per_tile` of the query blocks that chose it, region after region.

    Args:
        route_NK: int [N, K] regions, -1 = empty (in any slot).
        num_regions: R.
        blocks_per_tile: query blocks of a tile; the last tile of a region is filled up with padding.

    Returns:
        One `Tiles`, or none if the whole route is empty.
    """
    region_U, order_U = route_NK.flatten().sort(stable=True)
    empty = int((region_U < 0).sum())
    if empty == region_U.numel():
        return []
    region_U, block_U = region_U[empty:], order_U[empty:].div_(route_NK.shape[1], rounding_mode="floor").int()
    del order_U  # with one token to a block, a number for each pair takes much memory
    pairs_R = torch.bincount(region_U, minlength=num_regions)
    tiles_R = (pairs_R + blocks_per_tile - 1) // blocks_per_tile
    # The position of a region's first pair in the padded list, minus its position in the sorted list.
    shift_R = (tiles_R.cumsum(0) - tiles_R) * blocks_per_tile - (pairs_R.cumsum(0) - pairs_R)
    position_U = shift_R.index_select(0, region_U).add_(torch.arange(region_U.numel(), device=region_U.device))
    blocks = block_U.new_full((int(tiles_R.sum()), blocks_per_tile), -1)
    blocks.view(-1).scatter_(0, position_U, block_U)
    region_T = torch.arange(num_regions, device=region_U.device, dtype=torch.int32).repeat_interleave(tiles_R)
    return [Tiles(blocks.clamp(min=0), region_T[:, None], blocks < 0)]


def tile_elements(rows: int, keys: int, head_size: int) -> int:
    """Count the elements of the buffers that backward needs for one tile of `rows` query rows and `keys` keys."""
    return 2 * rows * keys + (3 * rows + 4 * keys) * head_size


class Workspace:
    """Buffers that all chunks reuse: the page faults of new ones would cost more than the gathers themselves."""

    def __init__(self, elements: int, ordered_elements: int, dtype: torch.dtype) -> None:
        """Start without buffers.

        Args:
            elements: about how many elements the buffers of a chunk of tiles may have; changes no bits.
            ordered_elements: the same for what decides the order of sums: runs of the band, and the largest tile that
                is one query block with all its regions.
            dtype: the working precision.
        """
        self.elements, self.ordered_elements, self.dtype = elements, ordered_elements, dtype
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return an uninitialised tensor; the next one of the same name and dtype reuses its memory."""
        size = math.prod(shape)
        key = (name, like.dtype)
        if key not in self.buffers or self.buffers[key].numel() < size:
            self.buffers[key] = like.new_empty(size)
        return self.buffers[key][:size].view(shape)

    def release(self) -> None:
        """Give all buffers back."""
        self.buffers.clear()

    def cast(self, name: str, x: Tensor) -> Tensor:
        """Return x itself, or a copy of it in the working precision."""
        if x.dtype == self.dtype:
            return x
        return self.take(name, x.shape, x.new_empty(0, dtype=self.dtype)).copy_(x)

    def gather(self, name: str, table: Tensor, entries: Tensor) -> Tensor:
        """Gather entries of a table for each tile, in the working precision.

        Args:
            name: of the buffer.
            table: [items, M, D] or [R, L, D].
            entries: int64 [T, entries of a tile].

        Returns:
            [T, entries of a tile * M, D], or L instead of M.
        """
        out = self.take(name, (entries.numel(), *table.shape[1:]), table)
        torch.index_select(table, 0, entries.reshape(-1), out=out)
        return self.cast(name, out.view(entries.shape[0], -1, table.shape[2]))

    def product(self, name: str, a: Tensor, b: Tensor, factor: float = 1.0, summand: Tensor | None = None) -> Tensor:
        """Return factor * a @ b + summand: batches of matrices [T, ...]; the summand is broadcast."""
        out = self.take(name, (*a.shape[:2], b.shape[2]), a)
        if summand is None:
            return out.baddbmm_(a, b, beta=0, alpha=factor)
        # The product would clear its output anyway, so the sum costs nothing.
        return out.copy_(summand).baddbmm_(a, b, alpha=factor)

    def chunks(self, groups: list[Tiles], x: Inputs) -> Iterator[Tiles]:
        """Cut groups of tiles of one shape so that the buffers of a chunk hold about `self.elements` elements."""
        heads, num_blocks, tokens, head_size = x.q.shape
        for group in groups:
            rows = heads * group.blocks.shape[1] * tokens
            keys = group.regions.shape[1] * x.k.shape[1]
            # A gradient of one query row is rounded otherwise where its tile is alone in a chunk, as the last may be.
            elements = self.ordered_elements if rows == 1 else self.elements
            at_once = max(1, elements // tile_elements(rows, keys, head_size))
            yield from group.chunks(at_once, heads, num_blocks)


@dataclass(frozen=True)
class Inputs:
    """One key/value head of one sequence. Weights are 2 ** (scale * log2 e * q k - softmax offset)."""

    q: Tensor  # [r, N, M, D]
    k: Tensor  # [R, L, D]
    v: Tensor  # [R, L, D]
    softmax_offset: Tensor  # [r, N, M]
    scale: float


@dataclass(frozen=True)
class Upstream:
    """The gradient of the output, and delta, which is subtracted from that gradient's products with the values."""

    dout: Tensor  # [r, N, M, D]
    delta: Tensor  # [r, N, M]


@dataclass(frozen=True)
class Gradients:
    """Sums that backward adds to."""

    dq: Tensor  # [r, N, M, D]
    dk: Tensor  # [R, L, D]
    dv: Tensor  # [R, L, D]


def tiles_max(groups: list[Tiles], x: Inputs, work: Workspace) -> Tensor:
    """Find the largest exponent of each query row over the tiles.

    Args:
        groups: tiles, each group of one shape.
        x: queries and keys; the softmax offset is not read.
        work: buffers.

    Returns:
        [r, N, M], -inf where a row has no tile.
    """
    max_rNM = torch.full_like(x.softmax_offset, -torch.inf)
    q_items, rows = x.q.flatten(0, 1), x.q.shape[2]
    for tiles in work.chunks(groups, x):
        k = work.gather("k", x.k, tiles.regions)
        q = work.gather("q", q_items, tiles.blocks)
        largest = work.product("weight", q, k.transpose(1, 2), x.scale * LOG2_E).amax(-1).view(-1, rows)
        if tiles.padding is not None:
            by_head = largest.view(tiles.blocks.shape[0], -1, tiles.padding.shape[1], rows)
            by_head.masked_fill_(tiles.padding[:, None, :, None], -torch.inf)
        item = tiles.blocks.reshape(-1, 1).expand(-1, rows)
        max_rNM.view(-1, rows).scatter_reduce_(0, item, largest, "amax")
    return max_rNM


def tiles_forward(groups: list[Tiles], x: Inputs, out_rNMD: Tensor, sum_rNM: Tensor, work: Workspace) -> None:
    """Add what the tiles contribute to the unnormalised output and to the sum of weights.

    Args:
        groups: tiles, each group of one shape.
        x: queries, keys, values and softmax offsets.
        out_rNMD: [r, N, M, D] sum of weighted values, changed in place.
        sum_rNM: [r, N, M] sum of weights, changed in place.
        work: buffers.
    """
    q_items, negated_items = x.q.flatten(0, 1), x.softmax_offset.flatten(0, 1).neg()
    out_items, sum_items = out_rNMD.flatten(0, 1), sum_rNM.flatten(0, 1)
    for tiles in work.chunks(groups, x):
        k, v = work.gather("k", x.k, tiles.regions), work.gather("v", x.v, tiles.regions)
        q = work.gather("q", q_items, tiles.blocks)
        negated_offset = tiles.offset_rows(negated_items)
        weight = powers_(work.product("weight", q, k.transpose(1, 2), x.scale * LOG2_E, negated_offset))
        add_entries(sum_items, tiles.blocks, weight.sum(-1))
        add_entries(out_items, tiles.blocks, work.product("out", weight, v))


def tiles_backward(groups: list[Tiles], x: Inputs, up: Upstream, grads: Gradients, work: Workspace) -> None:
    """Compute the weights of the tiles again and add to the gradients.

    Args:
        groups: tiles, each group of one shape.
        x: queries, keys and values; the softmax offset is the log-sum-exp over the whole route, to the base 2.
        up: the gradient of the output.
        grads: changed in place.
        work: buffers.
    """
    q_items, dout_items, dq_items = (each.flatten(0, 1) for each in (x.q, up.dout, grads.dq))
    negated_items, negated_deltas = x.softmax_offset.flatten(0, 1).neg(), up.delta.flatten(0, 1).neg()
    for tiles in work.chunks(groups, x):
        k, v = work.gather("k", x.k, tiles.regions), work.gather("v", x.v, tiles.regions)
        q, dout = work.gather("q", q_items, tiles.blocks), work.gather("do", dout_items, tiles.blocks)
        negated_offset = tiles.offset_rows(negated_items)
        weight = powers_(work.product("weight", q, k.transpose(1, 2), x.scale * LOG2_E, negated_offset))
        dscore = work.product("dscore", dout, v.transpose(1, 2), summand=tiles.rows(negated_deltas)).mul_(weight)
        dv = work.product("dv", weight.transpose(1, 2), dout)
        dk = work.product("dk", dscore.transpose(1, 2), q, x.scale)
        dq = work.product("dq", dscore, k, x.scale)
        add_entries(dq_items, tiles.blocks, dq)
        add_entries(grads.dk, tiles.regions, dk)
        add_entries(grads.dv, tiles.regions, dv)


def powers_(exponent: Tensor) -> Tensor:
    """Raise 2 to the exponents of T tiles, in place: the bits of an element do not depend on the number of tiles.

    On the CPU, PyTorch's exp2 rounds the last elements of a tensor, which fill no whole vector, differently. exp does
    not, but is slower. So exp2 is used only for tiles of whole vectors, a choice that depends on the shape of one
    tile.

    Args:
        exponent: [T, query rows, keys], changed in place.

    Returns:
        The same tensor.
    """
    if exponent.shape[1:].numel() % ELEMENTS_OF_VECTORS:
        return exponent.mul_(1 / LOG2_E).exp_()
    return exponent.exp2_()


def add_entries(table: Tensor, entries: Tensor, x: Tensor) -> None:
    """Add rows to entries of a table, the inverse of `Workspace.gather`.

    Args:
        table: [items, rows, ...], contiguous, changed in place.
        entries: int64 [T, entries of a tile]; an entry may occur several times.
        x: [T, entries of a tile * rows, ...].
    """
    table = table.flatten(1).squeeze(1)
    table.index_add_(0, entries.reshape(-1), x.view(-1, *table.shape[1:]))
