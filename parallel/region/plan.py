"""Which routed regions and which queries travel between the ranks that share a sequence: decided here, moved in
`region.py`. Pure functions of a route; no process group.

Rank p holds a contiguous run of regions and the queries of the same tokens. What one rank wants of another one, for
one KV group of one sequence, is a *unit*; each unit travels the way that costs fewer bytes:

- *fetch*: the owner sends keys and values of the regions that were chosen, each once;
- *ship*: the requester sends the queries that chose them, the owner returns their partial outputs and log-sum-exps.

Legend: B sequences, G KV groups, N query blocks of this rank, T slots of a route, U units, V visits (a query block
that chose regions of one owner), W wanted (distinct regions of a unit).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Way = Literal["auto", "fetch", "ship"]


@dataclass(frozen=True)
class RegionLayout:
    """Contiguous, equal runs of the regions of a sequence on `num_ranks` ranks. ValueError if they do not divide."""

    num_regions: int
    region_size: int  # tokens
    num_ranks: int

    def __post_init__(self) -> None:
        if self.num_regions % self.num_ranks:
            raise ValueError(f"{self.num_ranks} ranks do not divide the {self.num_regions} regions")

    @property
    def regions_per_rank(self) -> int:
        return self.num_regions // self.num_ranks

    @property
    def tokens_per_rank(self) -> int:
        return self.regions_per_rank * self.region_size

    def first_token(self, rank: int) -> int:
        return rank * self.tokens_per_rank

    def others(self, rank: int, causal: bool) -> int:
        """Ranks whose regions this one may choose: all others, or in a causal model the earlier ones."""
        return rank if causal else self.num_ranks - 1


@dataclass(frozen=True)
class ExchangeCosts:
    """Bytes that forward moves: backward moves the gradients of the same rows, so the cheaper way is the same."""

    region: int  # keys and values of a region of one KV group
    queries: int  # one query block of one KV group, on its way to the owner
    results: int  # its partial output and log-sum-exps, on the way back

    @classmethod
    def of(
        cls, *, region_size: int, query_block_size: int, heads_per_group: int, head_size: int, element_size: int
    ) -> ExchangeCosts:
        """For elements of `element_size` bytes; log-sum-exps travel in fp32."""
        rows = heads_per_group * query_block_size
        row = head_size * element_size
        return cls(region=2 * region_size * row, queries=rows * row, results=rows * (row + 4))


@dataclass(frozen=True)
class Units:
    """What one rank wants of the others, or they of it; ascending by the other rank, then by group b * G + g."""

    num_ranks: int
    num_groups: int  # B * G
    peer: Tensor  # int64 [U] the other rank
    group: Tensor  # int64 [U]
    ship: Tensor  # bool [U]
    visits: Tensor  # int64 [U] visits of each unit; an owner counts those that are shipped to it only
    wanted: Tensor  # int64 [U] distinct regions of each unit
    visit_slots: Tensor  # int64 [V, T] what each visit chose: places among the unit's regions, ascending, -1 last
    wanted_region: Tensor  # int64 [W] regions of all units, numbered on their owner

    def __iter__(self) -> Iterator[UnitAt]:
        """The units in order, with their places in the flat lists."""
        visit = wanted = shipped = fetched = 0
        columns = (self.group.tolist(), self.ship.tolist(), self.visits.tolist(), self.wanted.tolist())
        for group, ship, visits, regions in zip(*columns, strict=True):
            first, count = (shipped, visits) if ship else (fetched, regions)
            rows = slice(first, first + count)
            yield UnitAt(group, ship, slice(visit, visit + visits), slice(wanted, wanted + regions), rows)
            visit, wanted = visit + visits, wanted + regions
            shipped, fetched = shipped + visits * ship, fetched + regions * (not ship)

    def shipped_visits(self) -> list[int]:
        """Query blocks that travel to or from each rank."""
        return self.per_rank(self.ship * self.visits).tolist()

    def fetched_regions(self) -> list[int]:
        """Regions that travel from or to each rank."""
        return self.per_rank(~self.ship * self.wanted).tolist()

    def visit_ships(self) -> Tensor:
        """Is this visit's unit shipped? bool [V]."""
        return self.ship.repeat_interleave(self.visits)

    def table_rows(self, regions_per_rank: int) -> Tensor:
        """The fetched regions as rows of the owner's table of all groups, [B * G * regions_per_rank, ...]."""
        fetched_W = ~self.ship.repeat_interleave(self.wanted)
        group_W = self.group.repeat_interleave(self.wanted)
        return (group_W * regions_per_rank + self.wanted_region)[fetched_W]

    def per_rank(self, per_unit: Tensor) -> Tensor:
        """Sum of a number of each unit over the units of each rank, int64 [P]."""
        return per_unit.new_zeros(self.num_ranks, dtype=torch.int64).index_add_(0, self.peer, per_unit)


class UnitAt(NamedTuple):
    """One unit: its group, its way, and where it stands in the flat lists."""

    group: int
    ship: bool
    visits: slice
    wanted: slice
    rows: slice  # among the rows that travel its way: visits if shipped, regions if fetched


@dataclass(frozen=True)
class ExchangePlan:
    """What the queries of one rank need from the others."""

    rank: int
    layout: RegionLayout
    costs: ExchangeCosts
    units: Units
    visit_block: Tensor  # int64 [V] query block of each visit, numbered on this rank

    def received_bytes(self) -> Tensor:
        """Payload that comes from each rank in forward, int64 [P]."""
        units, costs = self.units, self.costs
        return units.per_rank(torch.where(units.ship, units.visits * costs.results, units.wanted * costs.region))

    def sent_bytes(self) -> Tensor:
        """Queries that go to each rank in forward, int64 [P]; what this rank sends as an owner, others' plans say."""
        return self.units.per_rank(self.units.ship * self.units.visits * self.costs.queries)

    def fetched_bytes(self) -> int:
        """Forward payload if everything were fetched."""
        return int(self.units.wanted.sum()) * self.costs.region

    def shipped_bytes(self) -> int:
        """Forward payload if everything were shipped, both ways together."""
        return int(self.units.visits.sum()) * (self.costs.queries + self.costs.results)


def traffic(plans: Sequence[ExchangePlan]) -> Tensor:
    """Forward payload from rank to rank, int64 [P, P], of the plans of all ranks together."""
    size = plans[0].layout.num_ranks
    bytes_PP = torch.zeros(size, size, dtype=torch.int64)
    for plan in plans:
        bytes_PP[:, plan.rank] += plan.received_bytes()
        bytes_PP[plan.rank] += plan.sent_bytes()
    return bytes_PP


def plan_exchange(
    route: Tensor, layout: RegionLayout, rank: int, costs: ExchangeCosts, way: Way = "auto"
) -> ExchangePlan:
    """The plan of `rank` for its queries' route.

    route int64 [B, G, N, T]: regions of the whole sequence that each of the rank's query blocks chose, ascending, -1
    = empty. `way` forces one way; "auto" takes the cheaper one, and fetches where both cost the same.
    """
    batch, groups, num_blocks, topk = route.shape
    per_rank, num_groups = layout.regions_per_rank, batch * groups
    route_gNT = route.reshape(num_groups, num_blocks, topk)
    owner_gNT = route_gNT.div(per_rank, rounding_mode="floor")
    g_E, block_E, slot_E = ((route_gNT >= 0) & (owner_gNT != rank)).nonzero(as_tuple=True)  # E: choices elsewhere
    owner_E, region_E = owner_gNT[g_E, block_E, slot_E], route_gNT[g_E, block_E, slot_E] % per_rank
    unit_E = owner_E * num_groups + g_E

    visit_V, visit_of_E = torch.unique(unit_E * num_blocks + block_E, return_inverse=True)
    wanted_W, wanted_of_E = torch.unique(unit_E * per_rank + region_E, return_inverse=True)
    unit_U, visits_U = torch.unique_consecutive(visit_V // num_blocks, return_counts=True)
    wanted_U = torch.unique_consecutive(wanted_W // per_rank, return_counts=True)[1]
    place_E = wanted_of_E - (wanted_U.cumsum(0) - wanted_U)[torch.searchsorted(unit_U, unit_E)]
    shipping_U, fetching_U = visits_U * (costs.queries + costs.results), wanted_U * costs.region
    ship_U = shipping_U < fetching_U if way == "auto" else torch.full_like(unit_U, way == "ship", dtype=torch.bool)
    units = Units(
        num_ranks=layout.num_ranks,
        num_groups=num_groups,
        peer=unit_U // num_groups,
        group=unit_U % num_groups,
        ship=ship_U,
        visits=visits_U,
        wanted=wanted_U,
        visit_slots=_slots(visit_of_E, place_E, visit_V.numel(), topk),
        wanted_region=wanted_W % per_rank,
    )
    return ExchangePlan(rank, layout, costs, units, visit_V % num_blocks)


def _slots(visit_E: Tensor, place_E: Tensor, num_visits: int, topk: int) -> Tensor:
    """The choices of each visit, ascending, then -1: [V, T]."""
    chosen_V = torch.bincount(visit_E, minlength=num_visits)
    # A route ascends, and so do the places of what it chose: in the order of visits, columns count up.
    order_E = visit_E.argsort(stable=True)
    visit_E, place_E = visit_E[order_E], place_E[order_E]
    column_E = torch.arange(visit_E.numel(), device=visit_E.device) - (chosen_V.cumsum(0) - chosen_V)[visit_E]
    slots_VT = place_E.new_full((num_visits, topk), -1)
    slots_VT[visit_E, column_E] = place_E
    return slots_VT


HEADER = 3  # numbers that announce a unit: is it shipped, its visits, its regions


def pack_requests(units: Units) -> tuple[Tensor, Tensor, list[int]]:
    """What a requester tells the owners: a header int64 [P, B * G, 3], a message int32 and its length for each owner.

    The part of one owner: the regions of all its units, then the slots of those that are shipped.
    """
    header_Pg3 = units.peer.new_zeros(units.num_ranks, units.num_groups, HEADER)
    header_Pg3[units.peer, units.group] = torch.stack((units.ship.long(), units.visits, units.wanted), -1)
    ship_V = units.visit_ships()
    regions = units.wanted_region.int().split(units.per_rank(units.wanted).tolist())
    slots = units.visit_slots[ship_V].int().split(units.shipped_visits())
    parts = [torch.cat((r, s.flatten())) for r, s in zip(regions, slots, strict=True)]
    return header_Pg3, torch.cat(parts), [len(part) for part in parts]


def request_lengths(header_Pg3: Tensor, topk: int) -> list[int]:
    """Length of the message of each requester whose header this is."""
    ship_Pg, visits_Pg, wanted_Pg = header_Pg3.unbind(-1)
    return (wanted_Pg + ship_Pg * visits_Pg * topk).sum(1).tolist()


def unpack_requests(header_Pg3: Tensor, message: Tensor, topk: int) -> Units:
    """What the others want of this rank, from what they packed: header [P, B * G, 3] and message by requester."""
    ship_Pg, visits_Pg, wanted_Pg = header_Pg3.unbind(-1)
    peer_U, group_U = (wanted_Pg > 0).nonzero(as_tuple=True)
    ship_U = ship_Pg[peer_U, group_U].bool()
    parts = message.long().split(request_lengths(header_Pg3, topk))
    cut = [part.tensor_split([regions]) for part, regions in zip(parts, wanted_Pg.sum(1).tolist(), strict=True)]
    return Units(
        num_ranks=header_Pg3.shape[0],
        num_groups=header_Pg3.shape[1],
        peer=peer_U,
        group=group_U,
        ship=ship_U,
        visits=visits_Pg[peer_U, group_U] * ship_U,
        wanted=wanted_Pg[peer_U, group_U],
        visit_slots=torch.cat([slots for _, slots in cut]).view(-1, topk),
        wanted_region=torch.cat([regions for regions, _ in cut]),
    )


@dataclass(frozen=True)
class Baselines:
    """What rank p would receive in forward of one layer by other means, in bytes."""

    causal_fetch: int  # keys and values of all tokens that its queries may see
    ring: int  # keys and values of all other ranks, as a ring or an all-gather moves them
    bound: int  # no route of this form can make the chosen plan move more

    @classmethod
    def of(
        cls,
        layout: RegionLayout,
        rank: int,
        costs: ExchangeCosts,
        *,
        groups: int,
        blocks: int,
        topk: int,
        causal: bool,
    ) -> Baselines:
        """`groups` B * G, `blocks` query blocks of a rank; `topk` regions of a route, of which causal ones have at
        least one (the own region) on this rank."""
        visible = layout.others(rank, causal)
        per_rank = groups * layout.regions_per_rank * costs.region
        elsewhere = topk - 1 if causal else topk
        ship = groups * blocks * min(elsewhere, visible) * (costs.queries + costs.results)
        return cls(
            causal_fetch=visible * per_rank,
            ring=(layout.num_ranks - 1) * per_rank,
            bound=min(visible * per_rank, ship),
        )
