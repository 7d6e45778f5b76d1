"""Decide which routed regions and which queries travel between the ranks that share a sequence.

These are pure functions of a route, without a process group; `transport.py` moves the bytes.

Rank p holds a contiguous run of regions and the queries of the same tokens. What one rank requests of another one,
for one key/value head of one sequence, is a *transfer*; each transfer travels the way that costs fewer bytes:

- *fetch*: the owner sends keys and values of the regions that were chosen, each once;
- *ship*: the requester sends the queries that chose them, the owner returns their partial outputs and log-sum-exps.

Shapes: B sequences, G key/value heads, g one of B * G, P ranks, N query blocks of this rank, K slots of a route,
T = P * B * G transfers, many of them empty, U pairs (a query block and an owner of whose regions it chose some), W
requested regions (distinct in a transfer), R regions of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from biroute.parallel.region.costs import ExchangeCosts, RegionLayout
from biroute.parallel.region.transfers import Transfers, places

Way = Literal["auto", "fetch", "ship"]


@dataclass(frozen=True)
class ExchangePlan:
    """What the queries of one rank need from the others."""

    rank: int
    layout: RegionLayout
    costs: ExchangeCosts
    transfers: Transfers
    pair_block: Tensor  # int64 [U] query block of each pair, numbered on this rank

    def received_bytes(self) -> Tensor:
        """Return the bytes of payload that come from each rank in forward, int64 [P] on the CPU."""
        return self._per_rank(pairs=self.costs.results, regions=self.costs.region)

    def sent_bytes(self) -> Tensor:
        """Return the bytes of queries that go to each rank in forward, int64 [P] on the CPU.

        What this rank sends as an owner is in the other ranks' plans.
        """
        return self._per_rank(pairs=self.costs.queries, regions=0)

    def _per_rank(self, pairs: int, regions: int) -> Tensor:
        counts = zip(self.transfers.shipped_pairs(), self.transfers.fetched_regions(), strict=True)
        return torch.tensor([shipped * pairs + fetched * regions for shipped, fetched in counts])


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
            ascending, -1 = empty and last.
        layout: which rank has which regions.
        rank: the rank.
        costs: bytes of a region, of queries and of results.
        way: "fetch" or "ship" for every transfer; "auto" takes the cheaper one, and fetches where both cost the same.
    """
    batch, groups, num_blocks, topk = route.shape
    per_rank, num_groups = layout.regions_per_rank, batch * groups
    size = layout.num_ranks * num_groups
    route_gNK = route.reshape(num_groups, num_blocks, topk)
    group_g11 = torch.arange(num_groups, device=route.device)[:, None, None]
    block_N1 = torch.arange(num_blocks, device=route.device)[:, None]
    owner_gNK = route_gNK.div(per_rank, rounding_mode="floor")
    elsewhere_gNK = (route_gNK >= 0) & (owner_gNK != rank)
    # Transfer T, one beyond the last, takes the choices that need none.
    transfer_gNK = torch.where(elsewhere_gNK, owner_gNK * num_groups + group_g11, size)
    pair_gNK = transfer_gNK * num_blocks + block_N1
    region_gNK = transfer_gNK * per_rank + torch.where(elsewhere_gNK, route_gNK % per_rank, 0)
    pairs_TN = _marked(pair_gNK, (size + 1) * num_blocks).view(-1, num_blocks)[:size]
    requested_TR = _marked(region_gNK, (size + 1) * per_rank).view(-1, per_rank)[:size]

    pairs_T, requested_T = pairs_TN.sum(1), requested_TR.sum(1)
    shipping_T, fetching_T = pairs_T * (costs.queries + costs.results), requested_T * costs.region
    ship_T = shipping_T < fetching_T if way == "auto" else requested_T * (way == "ship") > 0
    header = torch.stack((ship_T.long(), pairs_T, requested_T), -1).view(layout.num_ranks, num_groups, -1)
    numbers = header.tolist()  # the only wait for the device
    num_pairs, num_requested = (sum(group[i] for groups in numbers for group in groups) for i in (1, 2))

    slots_UK = route_gNK.new_full((num_pairs + 1, topk), -1)  # the last row takes what needs no transfer
    row_gNK = torch.where(
        elsewhere_gNK, (pairs_TN.flatten().cumsum(0) - 1)[pair_gNK.clamp(max=size * num_blocks - 1)], num_pairs
    )
    place_gNK = (requested_TR.cumsum(1) - 1).flatten()[region_gNK.clamp(max=size * per_rank - 1)]
    slots_UK.view(-1).scatter_(0, (row_gNK * topk + _columns(owner_gNK)).flatten(), place_gNK.flatten())
    transfers = Transfers(
        header, numbers, slots_UK[:num_pairs], places(requested_TR.flatten(), num_requested) % per_rank
    )
    return ExchangePlan(rank, layout, costs, transfers, places(pairs_TN.flatten(), num_pairs) % num_blocks)


def _marked(number: Tensor, size: int) -> Tensor:
    """Return a mask [size] that is true at each of the numbers."""
    mask = torch.zeros(size, dtype=torch.bool, device=number.device)
    return mask.scatter_(0, number.flatten(), True)


def _columns(owner_gNK: Tensor) -> Tensor:
    """Return the place of each choice among those of its query block and owner, which are neighbours."""
    slot_K = torch.arange(owner_gNK.shape[2], device=owner_gNK.device)
    begins_gNK = torch.ones_like(owner_gNK, dtype=torch.bool)
    begins_gNK[..., 1:] = owner_gNK[..., 1:] != owner_gNK[..., :-1]
    return slot_K - torch.where(begins_gNK, slot_K, 0).cummax(-1).values
