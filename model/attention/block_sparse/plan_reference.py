"""The plan of a route in plain torch, slow: what `plan.make_plan` must give, and what costs are counted from on CPUs.

Shapes: see `plan.py`; U = pairs of a tile or of a group.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from biroute.model.attention.block_sparse.plan import Blocking, Sorted, TilePlan, Visits, plan_programs
from biroute.model.attention.block_sparse.plan_kernels import EMPTY, FOLLOWS, LAST, SCATTERED


def reference_plan(
    route: Tensor, num_regions: int, sizes: Blocking, *, blocks: int, unit_size: int, which: Sorted
) -> tuple[TilePlan, Visits | None]:
    """The same arguments and results as `make_plan`; places that nothing reads hold zeros."""
    heads, num_blocks, slots = route.shape
    chunks = triton.cdiv(num_blocks, blocks)
    group = plan_programs(route, num_regions, sizes, blocks, which)[0] * sizes.tile
    parts = []
    for route_NK in route:  # a head at a time: sorting takes memory
        listed, members, counts, scattered, place = _shared(route_NK, num_regions, sizes)
        kinds = 2 if which == "all" else 1
        kept = {"none": torch.zeros_like(scattered), "scattered": scattered, "all": scattered | (place >= 0)}[which]
        key = torch.where(kept, route_NK * kinds + (scattered & (kinds == 2)), num_regions * kinds)
        # A segment of its own: `blocks` may not be whole groups.
        cut = [_flags(part, num_regions * kinds, group) for part in key.split(blocks)]
        flags = (torch.cat(cut) + scattered * SCATTERED.value).masked_fill(~kept, FOLLOWS.value)
        flags = flags.masked_fill(route_NK < 0, EMPTY.value)
        parts.append((listed, members, counts, flags.to(torch.int8), key, place))
    listed, members, counts, flags, key, place = (torch.stack(x) for x in zip(*parts, strict=True))
    plan = TilePlan(listed, members, counts, flags if which != "none" else flags.new_empty(0))
    if which == "none":
        return plan, None
    beyond = (0, 0, 0, chunks * blocks - num_blocks)
    pairs = heads * chunks, blocks * slots
    place = pad(place, beyond, value=-1).view(pairs)
    pair = torch.arange(pairs[1], device=route.device)
    tile = torch.div(pair, sizes.tile * slots, rounding_mode="floor")
    visit = torch.where(place >= 0, tile * listed.shape[2] + place, pair)
    visits = Visits.empty(route, *pairs, num_regions, unit_size, which, sizes)
    _invert(visits, pad(key, beyond, value=num_regions * kinds).view(pairs), visit, num_regions)
    return plan, visits


def _shared(route_NK: Tensor, num_regions: int, sizes: Blocking) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Regions chosen `shared_from` times in a tile, their members and number, which pairs are in none of them, and
    the places in the list of those pairs that are the first of a shared region (else -1)."""
    num_blocks, slots = route_NK.shape
    tiles, tile, shared_from = triton.cdiv(num_blocks, sizes.tile), sizes.tile, sizes.shared_from
    width = sizes.listed(slots, num_regions)
    padded = pad(route_NK.long(), (0, 0, 0, tiles * tile - num_blocks), value=-1)
    pairs_TU = padded.masked_fill(padded < 0, num_regions).view(tiles, tile * slots)
    region, order = pairs_TU.sort(dim=-1, stable=True)
    starts = _starts(region)
    # A run of equal regions is long enough if the pair `shared_from` - 1 places after its start is still of it.
    reaches = pad(region[:, shared_from - 1 :], (0, shared_from - 1), value=-1) == region
    starts &= reaches & (region < num_regions)
    place = starts.cumsum(-1) - 1  # of the last shared region up to here
    listed, members, first = (region.new_zeros(tiles, width + 1) for _ in range(3))
    first.fill_(tile * slots)
    at_start = torch.where(starts, place, width)
    listed.scatter_(-1, at_start, region)
    first.scatter_(-1, at_start, order)
    shared = (place >= 0) & (listed.gather(-1, place.clamp(min=0)) == region) & (region < num_regions)
    bit = torch.ones_like(order) << torch.div(order, slots, rounding_mode="floor")
    # A block names a region once: the sum is an or.
    members.scatter_add_(-1, torch.where(shared, place, width), bit)
    scattered = torch.empty_like(shared).scatter_(-1, order, ~shared & (region < num_regions))
    lead, earliest = first[:, :width].sort(dim=-1, stable=True)
    leads = region.new_full((tiles, tile * slots + 1), -1)
    leads.scatter_(-1, lead, torch.arange(width, device=route_NK.device).expand_as(lead))
    leads = leads[:, :-1].reshape(-1, slots)[:num_blocks]
    kept = torch.arange(width, device=route_NK.device) < starts.sum(-1, keepdim=True)
    listed, members = (x[:, :width].gather(-1, earliest).masked_fill(~kept, 0).int() for x in (listed, members))
    return listed, members, starts.sum(-1, dtype=torch.int32), scattered.view(-1, slots)[:num_blocks], leads


def _starts(region: Tensor) -> Tensor:
    """Where runs of equal regions begin in sorted rows."""
    starts = torch.ones_like(region, dtype=torch.bool)
    starts[:, 1:] = region[:, 1:] != region[:, :-1]
    return starts


def _flags(region: Tensor, num_regions: int, group: int) -> Tensor:
    """Each pair's place among those of its region in its group of blocks, and whether it is the last; [n, K]."""
    num_blocks, slots = region.shape
    padded = pad(region, (0, 0, 0, -num_blocks % group), value=num_regions).view(-1, group * slots)
    in_order, order = padded.sort(dim=-1, stable=True)
    starts = _starts(in_order)
    place = torch.arange(group * slots, device=region.device).expand_as(starts)
    place = place - torch.where(starts, place, 0).cummax(-1).values
    flag = place + pad(starts[:, 1:], (0, 1), value=True) * LAST.value
    flag = flag.masked_fill(in_order == num_regions, 0)
    return torch.empty_like(flag).scatter_(-1, order, flag).view(-1, slots)[:num_blocks]


def _invert(visits: Visits, key: Tensor, visit: Tensor, num_regions: int) -> None:
    """Sort the visits of each segment by region and kind, [segments, n * K], the highest key where there is none."""
    segments, kinds = len(key), visits.kinds
    in_order, order = key.sort(dim=1, stable=True)
    visits.order.copy_(visit.gather(1, order))
    edges = torch.arange(num_regions * kinds + 1, device=key.device, dtype=key.dtype).repeat(segments, 1)
    visits.start.copy_(torch.searchsorted(in_order, edges))
    size = torch.tensor([visits.tile_unit, visits.unit_size][-kinds:], device=key.device)
    numbers = visits.start.diff(dim=1).view(segments, num_regions, kinds)
    units = ((numbers + size - 1) // size).amax(-1)
    visits.unit_first.copy_(pad(units.cumsum(1), (1, 0)))
    visits.extra_first.copy_(pad((units - 1).clamp(min=0).cumsum(1), (1, 0)))
    number = torch.arange(visits.unit_region.shape[1], device=key.device, dtype=torch.int32).repeat(segments, 1)
    visits.unit_region.copy_(torch.searchsorted(visits.unit_first[:, 1:].contiguous(), number, right=True))
