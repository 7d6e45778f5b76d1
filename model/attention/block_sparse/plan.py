"""How the kernels cut a route: what neighbouring queries share, what is scattered, and who visits each region.

A tile is a few neighbouring query blocks. A region that enough of a tile's blocks chose is *shared*: the tile attends
it once, as one dense product under a mask of its members. The other (query block, region) pairs are *scattered*: they
are sorted by region, so that a region's keys and values are loaded once and its visitors are streamed past them.
A block with many query rows is a tile of its own, and then everything is shared.

Everything here has a size that shapes alone decide, so that the host never waits for the device.

Shapes: Z = B * G key/value heads of all sequences, N query blocks, K slots of a route, R regions, T tiles of a
sequence, W regions that a tile may share, U = blocks of a tile * K pairs of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

# Query rows of a tile: as many as one product of the tensor cores takes without spilling registers.
ROWS_OF_TILE = 64
# A region is shared by a tile if at least this fraction of the tile's blocks chose it. A shared region costs the tile
# its keys and values from the cache and a whole product; a scattered pair costs its queries and a partial output,
# written and read again. By counted work 4 pairs of 16 cost about as much (docs/gpu.md).
SHARED_FRACTION = 1 / 4
# Elements of a region's keys that a program holds on chip; a larger region is cut into parts.
KEYS_ON_CHIP = 64 * 128
# Pairs that are sorted together: bounds the memory of the plan.
PAIRS_AT_ONCE = 1 << 23


@dataclass(frozen=True)
class Blocking:
    """Sizes of tiles and parts, decided by shapes alone."""

    heads: int  # r, query heads of a key/value head
    block: int  # Lq, tokens of a query block
    region: int  # L, tokens of a region
    tile: int  # query blocks of a tile
    shared_from: int  # blocks of a tile that must choose a region for it to be shared
    parts: int  # parts of a region
    part: int  # tokens of a part; the last one may have fewer

    @staticmethod
    def of(*, heads: int, block: int, region: int, head_size: int) -> Blocking:
        """The sizes for a layer."""
        rows = heads * block
        tile = min(32, max(1, ROWS_OF_TILE // rows))  # 32: the members of a tile are the bits of an int32
        parts = min(region, -(-region * head_size // KEYS_ON_CHIP))
        return Blocking(
            heads=heads,
            block=block,
            region=region,
            tile=tile,
            shared_from=max(1, round(tile * SHARED_FRACTION)),
            parts=parts,
            part=-(-region // parts),
        )

    @property
    def rows(self) -> int:
        """Query rows of a block, over the heads."""
        return self.heads * self.block

    @property
    def all_shared(self) -> bool:
        """Whether every pair is shared, whatever the route."""
        return self.shared_from == 1


@dataclass(frozen=True)
class TilePlan:
    """The shared regions of each tile and the scattered pairs of a route."""

    listed: Tensor  # int32 [Z, T, W]: the shared regions of a tile, ascending; only the first `counts` of them count
    members: Tensor  # int32 [Z, T, W]: bit i is set if block i of the tile chose the region
    counts: Tensor  # int32 [Z, T]
    scattered: Tensor  # bool [Z, N, K]: the pair is attended region by region


def plan_tiles(route: Tensor, num_regions: int, sizes: Blocking) -> TilePlan:
    """Find the regions that the blocks of a tile share.

    Args:
        route: int32 [Z, N, K] of regions, -1 = empty (anywhere).
        num_regions: R.
        sizes: how blocks form tiles.
    """
    heads, num_blocks, slots = route.shape
    tiles = -(-num_blocks // sizes.tile)
    width = sizes.tile * slots // sizes.shared_from
    listed, members = (route.new_empty(heads, tiles, width) for _ in range(2))
    counts = route.new_empty(heads, tiles)
    scattered = torch.empty(heads, tiles * sizes.tile, slots, dtype=torch.bool, device=route.device)
    at_once = max(1, PAIRS_AT_ONCE // max(1, tiles * sizes.tile * slots))
    for first in range(0, heads, at_once):
        part = slice(first, first + at_once)
        padded = pad(route[part], (0, 0, 0, tiles * sizes.tile - num_blocks), value=-1)
        pairs = padded.masked_fill(padded < 0, num_regions).view(-1, tiles, sizes.tile * slots)
        found = _shared_of_tiles(pairs, num_regions, slots, sizes.shared_from, width)
        listed[part], members[part], counts[part] = found[:3]
        scattered[part] = found[3].view(-1, tiles * sizes.tile, slots)
    # Kernels find a head's pairs by the number of its blocks, so what pads its last tile must not stay between heads.
    return TilePlan(listed, members, counts, scattered[:, :num_blocks].contiguous())


def _shared_of_tiles(
    pairs_ZTU: Tensor, num_regions: int, slots: int, shared_from: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Regions chosen `shared_from` times in a tile, their members and number, and which pairs are in none of them."""
    region, order = pairs_ZTU.sort(dim=-1)
    starts = torch.ones_like(region, dtype=torch.bool)
    starts[..., 1:] = region[..., 1:] != region[..., :-1]
    # A run of equal regions is long enough if the pair `shared_from` - 1 places after its start is still of it.
    reaches = pad(region[..., shared_from - 1 :], (0, shared_from - 1), value=-1) == region
    starts &= reaches & (region < num_regions)
    place = starts.cumsum(-1) - 1  # of the last shared region up to here
    listed = region.new_zeros(*region.shape[:-1], width + 1)
    listed.scatter_(-1, torch.where(starts, place, width), region)
    shared = (place >= 0) & (listed.gather(-1, place.clamp(min=0)) == region) & (region < num_regions)
    bit = (torch.ones_like(order) << torch.div(order, slots, rounding_mode="floor")).int()
    members = torch.zeros_like(listed)
    members.scatter_add_(-1, torch.where(shared, place, width), bit)  # a block names a region once: the sum is an or
    scattered = torch.empty_like(shared).scatter_(-1, order, ~shared & (region < num_regions))
    return listed[..., :width], members[..., :width], starts.sum(-1, dtype=torch.int32), scattered


@dataclass(frozen=True)
class Visits:
    """The pairs of each segment (a run of query blocks of one key/value head), sorted by region and cut into units.

    A unit is what one program streams past one region: at most `unit_size` visits.
    """

    order: Tensor  # int32 [segments, n * K]: pairs (local block * K + slot), region after region
    start: Tensor  # int32 [segments, R + 1]: where a region's visits begin in `order`
    unit_region: Tensor  # int32 [segments, units]: the region of each unit; R = no unit
    unit_first: Tensor  # int32 [segments, R + 1]: the first unit of each region
    extra_first: Tensor  # int32 [segments, R + 1]: the same, not counting the first unit of any region
    unit_size: int
    num_extra: int  # most units of a segment that are not the first one of a region


def invert(region: Tensor, num_regions: int, unit_size: int) -> Visits:
    """Sort pairs by region.

    Args:
        region: [segments, n * K] the region of each pair; `num_regions` where there is none.
        num_regions: R.
        unit_size: most visits of a unit.
    """
    segments, pairs = region.shape
    region = region.to(torch.int16 if num_regions < 2**15 else torch.int32)  # 16 bits sort in half the time
    edges = torch.arange(num_regions + 1, device=region.device, dtype=region.dtype)
    order = torch.empty(segments, pairs, dtype=torch.int32, device=region.device)
    start = torch.empty(segments, num_regions + 1, dtype=torch.int32, device=region.device)
    at_once = max(1, PAIRS_AT_ONCE // max(1, pairs))
    for first in range(0, segments, at_once):
        part = slice(first, first + at_once)
        sorted_region, order[part] = region[part].sort(dim=1, stable=True)
        every = edges.expand(len(sorted_region), -1).contiguous()
        start[part] = torch.searchsorted(sorted_region, every, out_int32=True)
    units = (start.diff(dim=1) + (unit_size - 1)) // unit_size
    unit_first, extra_first = (
        pad(x.cumsum(1, dtype=torch.int32), (1, 0)) for x in (units, (units - 1).clamp_(min=0))
    )
    most = pairs // unit_size + min(num_regions, pairs)
    number = torch.arange(most, device=region.device, dtype=torch.int32).expand(segments, most)
    unit_region = torch.searchsorted(unit_first[:, 1:].contiguous(), number.contiguous(), right=True, out_int32=True)
    return Visits(order, start, unit_region, unit_first, extra_first, unit_size, pairs // unit_size)


def cut_segments(num_heads: int, num_blocks: int, bytes_per_block: int, tile: int, scratch: int) -> tuple[int, int]:
    """Cut the query blocks so that the partial results of one launch fit into the scratch memory.

    Returns:
        Query blocks of a segment (whole tiles of them), and segments of one launch. A launch takes several segments
        only where a segment is a whole sequence.
    """
    if num_blocks * bytes_per_block <= scratch:
        at_once = max(1, min(num_heads, scratch // max(1, num_blocks * bytes_per_block)))
        return num_blocks, at_once
    blocks = max(tile, scratch // bytes_per_block // tile * tile)
    return min(blocks, num_blocks), 1
