"""Decide which routed regions and which queries travel between the ranks that share a sequence.

These are pure functions of a route, without a process group; `transport.py` moves the bytes.

Rank p holds a contiguous run of regions and the queries of the same tokens. What one rank requests of another one,
for one key/value head of one sequence, is a *transfer*; each transfer travels the way that costs fewer bytes:

- *fetch*: the owner sends keys and values of the regions that were chosen, each once;
- *ship*: the requester sends the queries that chose them, the owner returns their partial outputs and log-sum-exps.

Shapes: B sequences, G key/value heads, g one of B * G, P ranks, N query blocks of this rank, K slots of a route, X
transfers, U pairs (a query block and an owner of whose regions it chose some), W requested regions (distinct in a
transfer), E choices of regions of other ranks.
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
    """The regions of a sequence on `num_ranks` ranks: each has a contiguous run of equal length.

    Raises:
        ValueError: the ranks do not divide the regions.
    """

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
        """Return how many ranks' regions this one may choose: all others, or in a causal model the earlier ones."""
        return rank if causal else self.num_ranks - 1


@dataclass(frozen=True)
class ExchangeCosts:
    """Bytes that forward moves. Backward moves the gradients of the same rows, so the cheaper way is the same."""

    region: int  # keys and values of a region of one key/value head
    queries: int  # one query block of one key/value head, on its way to the owner
    results: int  # its partial output and log-sum-exps, on the way back

    @classmethod
    def of(
        cls, *, region_size: int, query_block_size: int, heads_per_group: int, head_size: int, element_size: int
    ) -> ExchangeCosts:
        """Compute the costs for elements of `element_size` bytes; log-sum-exps travel in fp32."""
        rows = heads_per_group * query_block_size
        row = head_size * element_size
        return cls(region=2 * region_size * row, queries=rows * row, results=rows * (row + 4))


@dataclass(frozen=True)
class Transfers:
    """What one rank requests of the others, or they of it; ascending by the other rank, then by group b * G + g."""

    num_ranks: int
    num_groups: int  # B * G
    peer: Tensor  # int64 [X] the other rank
    group: Tensor  # int64 [X]
    ship: Tensor  # bool [X]
    pairs: Tensor  # int64 [X] pairs of each transfer; an owner counts those that are shipped to it only
    requested: Tensor  # int64 [X] distinct regions of each transfer
    pair_slots: Tensor  # int64 [U, K] what each pair chose: places among the transfer's regions, ascending, -1 last
    requested_region: Tensor  # int64 [W] regions of all transfers, numbered on their owner

    def __iter__(self) -> Iterator[Transfer]:
        """Yield the transfers in order, with their places in the flat lists."""
        pair = requested = shipped = fetched = 0
        columns = (self.group.tolist(), self.ship.tolist(), self.pairs.tolist(), self.requested.tolist())
        for group, ship, pairs, regions in zip(*columns, strict=True):
            first, count = (shipped, pairs) if ship else (fetched, regions)
            rows = slice(first, first + count)
            yield Transfer(group, ship, slice(pair, pair + pairs), slice(requested, requested + regions), rows)
            pair, requested = pair + pairs, requested + regions
            shipped, fetched = shipped + pairs * ship, fetched + regions * (not ship)

    def shipped_pairs(self) -> list[int]:
        """Count the query blocks that travel to or from each rank."""
        return self.per_rank(self.ship * self.pairs).tolist()

    def fetched_regions(self) -> list[int]:
        """Count the regions that travel from or to each rank."""
        return self.per_rank(~self.ship * self.requested).tolist()

    def is_shipped(self) -> Tensor:
        """Return for each pair whether its transfer is shipped, bool [U]."""
        return self.ship.repeat_interleave(self.pairs)

    def table_rows(self, regions_per_rank: int) -> Tensor:
        """Return the rows of the fetched regions in the owner's table of all groups, [B * G * R, ...]."""
        fetched_W = ~self.ship.repeat_interleave(self.requested)
        group_W = self.group.repeat_interleave(self.requested)
        return (group_W * regions_per_rank + self.requested_region)[fetched_W]

    def per_rank(self, per_unit: Tensor) -> Tensor:
        """Sum a number of each transfer over the transfers of each rank: int64 [P]."""
        return per_unit.new_zeros(self.num_ranks, dtype=torch.int64).index_add_(0, self.peer, per_unit)


class Transfer(NamedTuple):
    """One transfer: its group, its way, and where it stands in the flat lists."""

    group: int
    ship: bool
    pairs: slice
    requested: slice
    rows: slice  # among the rows that travel its way: pairs if shipped, regions if fetched


@dataclass(frozen=True)
class ExchangePlan:
    """What the queries of one rank need from the others."""

    rank: int
    layout: RegionLayout
    costs: ExchangeCosts
    transfers: Transfers
    pair_block: Tensor  # int64 [U] query block of each pair, numbered on this rank

    def received_bytes(self) -> Tensor:
        """Return the bytes of payload that come from each rank in forward, int64 [P]."""
        transfers, costs = self.transfers, self.costs
        return transfers.per_rank(
            torch.where(transfers.ship, transfers.pairs * costs.results, transfers.requested * costs.region)
        )

    def sent_bytes(self) -> Tensor:
        """Return the bytes of queries that go to each rank in forward, int64 [P].

        What this rank sends as an owner is in the other ranks' plans.
        """
        return self.transfers.per_rank(self.transfers.ship * self.transfers.pairs * self.costs.queries)


def traffic(plans: Sequence[ExchangePlan]) -> Tensor:
    """Return the bytes of forward payload from rank to rank, int64 [P, P], from the plans of all ranks."""
    size = plans[0].layout.num_ranks
    bytes_PP = torch.zeros(size, size, dtype=torch.int64)
    for plan in plans:
        bytes_PP[:, plan.rank] += plan.received_bytes()
        bytes_PP[plan.rank] += plan.sent_bytes()
    return bytes_PP


def plan_exchange(
    route: Tensor, layout: RegionLayout, rank: int, costs: ExchangeCosts, way: Way = "auto"
) -> ExchangePlan:
    """Plan the transfers that the queries of one rank need.

    Args:
        route: int64 [B, G, N, K], regions of the whole sequence that each of the rank's query blocks chose,
            ascending, -1 = empty.
        layout: which rank has which regions.
        rank: the rank.
        costs: bytes of a region, of queries and of results.
        way: "fetch" or "ship" for every transfer; "auto" takes the cheaper one, and fetches where both cost the same.
    """
    batch, groups, num_blocks, topk = route.shape
    per_rank, num_groups = layout.regions_per_rank, batch * groups
    route_gNK = route.reshape(num_groups, num_blocks, topk)
    owner_gNK = route_gNK.div(per_rank, rounding_mode="floor")
    g_E, block_E, slot_E = ((route_gNK >= 0) & (owner_gNK != rank)).nonzero(as_tuple=True)  # E: choices elsewhere
    owner_E, region_E = owner_gNK[g_E, block_E, slot_E], route_gNK[g_E, block_E, slot_E] % per_rank
    transfer_E = owner_E * num_groups + g_E

    pair_U, pair_of_E = torch.unique(transfer_E * num_blocks + block_E, return_inverse=True)
    requested_W, requested_of_E = torch.unique(transfer_E * per_rank + region_E, return_inverse=True)
    transfer_X, pairs_X = torch.unique_consecutive(pair_U // num_blocks, return_counts=True)
    requested_X = torch.unique_consecutive(requested_W // per_rank, return_counts=True)[1]
    place_E = requested_of_E - (requested_X.cumsum(0) - requested_X)[torch.searchsorted(transfer_X, transfer_E)]
    shipping_X, fetching_X = pairs_X * (costs.queries + costs.results), requested_X * costs.region
    ship_X = (
        shipping_X < fetching_X if way == "auto" else torch.full_like(transfer_X, way == "ship", dtype=torch.bool)
    )
    transfers = Transfers(
        num_ranks=layout.num_ranks,
        num_groups=num_groups,
        peer=transfer_X // num_groups,
        group=transfer_X % num_groups,
        ship=ship_X,
        pairs=pairs_X,
        requested=requested_X,
        pair_slots=_slots(pair_of_E, place_E, pair_U.numel(), topk),
        requested_region=requested_W % per_rank,
    )
    return ExchangePlan(rank, layout, costs, transfers, pair_U % num_blocks)


def _slots(pair_E: Tensor, place_E: Tensor, num_pairs: int, topk: int) -> Tensor:
    """Return the choices of each pair, ascending, then -1: [U, K]."""
    chosen_U = torch.bincount(pair_E, minlength=num_pairs)
    # A route ascends, and so do the places of what it chose: in the order of pairs, columns count up.
    order_E = pair_E.argsort(stable=True)
    pair_E, place_E = pair_E[order_E], place_E[order_E]
    column_E = torch.arange(pair_E.numel(), device=pair_E.device) - (chosen_U.cumsum(0) - chosen_U)[pair_E]
    slots_UK = place_E.new_full((num_pairs, topk), -1)
    slots_UK[pair_E, column_E] = place_E
    return slots_UK


HEADER = 3  # numbers that announce a transfer: is it shipped, its pairs, its regions


def pack_requests(transfers: Transfers) -> tuple[Tensor, Tensor, list[int]]:
    """Pack a rank's requests for their owners.

    Returns:
        The header, int64 [P, B * G, 3]; the message, int32; and the length of the message for each owner. An owner's
        part of the message has the regions of all its transfers, then the slots of those that are shipped.
    """
    header_Pg3 = transfers.peer.new_zeros(transfers.num_ranks, transfers.num_groups, HEADER)
    header_Pg3[transfers.peer, transfers.group] = torch.stack(
        (transfers.ship.long(), transfers.pairs, transfers.requested), -1
    )
    ship_U = transfers.is_shipped()
    regions = transfers.requested_region.int().split(transfers.per_rank(transfers.requested).tolist())
    slots = transfers.pair_slots[ship_U].int().split(transfers.shipped_pairs())
    parts = [torch.cat((r, s.flatten())) for r, s in zip(regions, slots, strict=True)]
    return header_Pg3, torch.cat(parts), [len(part) for part in parts]


def request_lengths(header_Pg3: Tensor, topk: int) -> list[int]:
    """Compute the length of each requester's message from the headers."""
    ship_Pg, pairs_Pg, requested_Pg = header_Pg3.unbind(-1)
    return (requested_Pg + ship_Pg * pairs_Pg * topk).sum(1).tolist()


def unpack_requests(header_Pg3: Tensor, message: Tensor, topk: int) -> Transfers:
    """Unpack what the others request of this rank: header [P, B * G, 3] and message, both by requester."""
    ship_Pg, pairs_Pg, requested_Pg = header_Pg3.unbind(-1)
    peer_X, group_X = (requested_Pg > 0).nonzero(as_tuple=True)
    ship_X = ship_Pg[peer_X, group_X].bool()
    parts = message.long().split(request_lengths(header_Pg3, topk))
    cut = [part.tensor_split([regions]) for part, regions in zip(parts, requested_Pg.sum(1).tolist(), strict=True)]
    return Transfers(
        num_ranks=header_Pg3.shape[0],
        num_groups=header_Pg3.shape[1],
        peer=peer_X,
        group=group_X,
        ship=ship_X,
        pairs=pairs_Pg[peer_X, group_X] * ship_X,
        requested=requested_Pg[peer_X, group_X],
        pair_slots=torch.cat([slots for _, slots in cut]).view(-1, topk),
        requested_region=torch.cat([regions for regions, _ in cut]),
    )


@dataclass(frozen=True)
class Baselines:
    """Bytes that a rank would receive in forward of one layer by other means."""

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
        """Compute the baselines of one rank.

        Args:
            layout: which rank has which regions.
            rank: the rank.
            costs: bytes of a region, of queries and of results.
            groups: B * G.
            blocks: query blocks of a rank.
            topk: regions of a route. In a causal model at least one of them, the own region, is on this rank.
            causal: whether a query may choose earlier regions only.
        """
        visible = layout.others(rank, causal)
        per_rank = groups * layout.regions_per_rank * costs.region
        elsewhere = topk - 1 if causal else topk
        ship = groups * blocks * min(elsewhere, visible) * (costs.queries + costs.results)
        return cls(
            causal_fetch=visible * per_rank,
            ring=(layout.num_ranks - 1) * per_rank,
            bound=min(visible * per_rank, ship),
        )
