"""What one rank requests of the others, or they of it: lists on the device whose sizes the host knows.

The host reads the sizes once, when the transfers are made; nothing that uses them waits for the device.

Shapes: P ranks, g one of B * G key/value heads of all sequences, X transfers, U pairs (a query block and an owner of
whose regions it chose some), W requested regions (distinct in a transfer), K slots of a route.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class TransferSize(NamedTuple):
    """The numbers of one transfer, on the host."""

    peer: int
    group: int  # b * G + g
    ship: bool
    pairs: int
    requested: int


class Transfer(NamedTuple):
    """One transfer: its group, its way, and its places in the flat lists."""

    group: int
    ship: bool
    pairs: slice
    requested: slice
    rows: slice  # among the rows that travel its way: pairs if shipped, regions if fetched


@dataclass(frozen=True)
class Transfers:
    """Transfers in the order of the other rank, then of the group."""

    # int64 [P, B * G, 3]: whether it is shipped, its pairs, its regions. Without regions there is no transfer.
    header: Tensor
    numbers: list[list[list[int]]]  # the header on the host
    pair_slots: Tensor  # int64 [U, K] what each pair chose: places among the transfer's regions, ascending, -1 last
    requested_region: Tensor  # int64 [W] regions of all transfers, numbered on their owner

    @property
    def num_groups(self) -> int:
        """B * G."""
        return self.header.shape[1]

    @cached_property
    def sizes(self) -> list[TransferSize]:
        """The sizes of all transfers."""
        return [
            TransferSize(peer, group, bool(ship), pairs, requested)
            for peer, groups in enumerate(self.numbers)
            for group, (ship, pairs, requested) in enumerate(groups)
            if requested
        ]

    def __iter__(self) -> Iterator[Transfer]:
        """Yield the transfers in order, with their places in the flat lists."""
        pair = requested = shipped = fetched = 0
        for size in self.sizes:
            first, count = (shipped, size.pairs) if size.ship else (fetched, size.requested)
            yield Transfer(
                size.group,
                size.ship,
                slice(pair, pair + size.pairs),
                slice(requested, requested + size.requested),
                slice(first, first + count),
            )
            pair, requested = pair + size.pairs, requested + size.requested
            shipped, fetched = shipped + size.pairs * size.ship, fetched + size.requested * (not size.ship)

    def shipped_pairs(self) -> list[int]:
        """Count the query blocks that travel to or from each rank."""
        return self._per_rank([size.pairs * size.ship for size in self.sizes])

    def fetched_regions(self) -> list[int]:
        """Count the regions that travel from or to each rank."""
        return self._per_rank([size.requested * (not size.ship) for size in self.sizes])

    def fetched_of_groups(self) -> list[int]:
        """Count the regions that are fetched for each group, of all ranks together."""
        counts = [0] * self.num_groups
        for size in self.sizes:
            counts[size.group] += size.requested * (not size.ship)
        return counts

    def requested_regions(self) -> list[int]:
        """Count the regions that are requested of or by each rank, whichever way they are reached."""
        return self._per_rank([size.requested for size in self.sizes])

    @cached_property
    def group_of_pair(self) -> Tensor:
        """The group of each pair, int64 [U]."""
        return self._group.repeat_interleave(self._pairs, output_size=len(self.pair_slots))

    @cached_property
    def shipped(self) -> Tensor:
        """The places of the shipped pairs among all, int64, ascending."""
        count, total = sum(self.shipped_pairs()), len(self.pair_slots)
        if count in (0, total):
            return torch.arange(count, device=self.header.device)
        return places(self._ship.repeat_interleave(self._pairs, output_size=total), count)

    def table_rows(self, regions_per_rank: int) -> Tensor:
        """Return the rows of the fetched regions in the owner's table of all groups, [B * G * R, ...]."""
        group = self._of_requested(self._group)
        return (group * regions_per_rank + self.requested_region)[self._fetched]

    def fetched_places(self, regions_per_rank: int) -> tuple[Tensor, Tensor]:
        """Return the group of each fetched region, and its number in the whole sequence."""
        group, peer = self._of_requested(self._group), self._of_requested(self._place // self.num_groups)
        return group[self._fetched], (peer * regions_per_rank + self.requested_region)[self._fetched]

    def _of_requested(self, of_transfer: Tensor) -> Tensor:
        """Repeat values of the transfers for each of their requested regions."""
        return of_transfer.repeat_interleave(self._requested, output_size=len(self.requested_region))

    @cached_property
    def _fetched(self) -> Tensor:
        """The places of the fetched regions among all that are requested, int64, ascending."""
        count = sum(self.fetched_regions())
        if count in (0, len(self.requested_region)):
            return torch.arange(count, device=self.header.device)
        return places(~self._of_requested(self._ship), count)

    @cached_property
    def _place(self) -> Tensor:
        """The places of the transfers in the flattened header, int64 [X]."""
        there = [requested > 0 for groups in self.numbers for _, _, requested in groups]
        first, count = (there.index(True) if self.sizes else 0), len(self.sizes)
        if all(there[first : first + count]):  # as in a causal model: all of the ranks before this one, or after it
            return torch.arange(first, first + count, device=self.header.device)
        return places(self.header[..., 2].flatten() > 0, count)

    @cached_property
    def _group(self) -> Tensor:
        return self._place % self.num_groups

    @cached_property
    def _ship(self) -> Tensor:
        return self._numbers[:, 0].bool()

    @property
    def _pairs(self) -> Tensor:
        return self._numbers[:, 1]

    @property
    def _requested(self) -> Tensor:
        return self._numbers[:, 2]

    @cached_property
    def _numbers(self) -> Tensor:
        """The header's rows of the transfers, int64 [X, 3]."""
        return self.header.flatten(0, 1)[self._place]

    def _per_rank(self, numbers: list[int]) -> list[int]:
        sums = [0] * len(self.numbers)
        for size, number in zip(self.sizes, numbers, strict=True):
            sums[size.peer] += number
        return sums


def places(mask: Tensor, count: int) -> Tensor:
    """Return the places of the `count` true elements of a mask [n], ascending: `nonzero` that waits for no size."""
    place = torch.where(mask, mask.cumsum(0) - 1, count)
    found = place.new_empty(count + 1)
    return found.scatter_(0, place, torch.arange(len(mask), device=mask.device))[:count]


def pack_requests(transfers: Transfers) -> tuple[Tensor, Tensor, list[int]]:
    """Pack a rank's requests for their owners.

    Returns:
        The header, int64 [P, B * G, 3]; the message, int32; and the length of the message for each owner. An owner's
        part of the message has the regions of all its transfers, then the slots of those that are shipped.
    """
    regions = transfers.requested_region.int().split(transfers.requested_regions())
    slots = transfers.pair_slots[transfers.shipped].int().split(transfers.shipped_pairs())
    parts = [torch.cat((r, s.flatten())) for r, s in zip(regions, slots, strict=True)]
    return transfers.header, torch.cat(parts), [len(part) for part in parts]


def request_lengths(numbers: list[list[list[int]]], topk: int) -> list[int]:
    """Compute the length of each requester's message from the headers, on the host."""
    return [sum(requested + ship * pairs * topk for ship, pairs, requested in groups) for groups in numbers]


def unpack_requests(header: Tensor, numbers: list[list[list[int]]], message: Tensor, topk: int) -> Transfers:
    """Unpack what the others request of this rank.

    Args:
        header: int64 [P, B * G, 3], by requester.
        numbers: the same on the host.
        message: int32, by requester.
        topk: K.

    Returns:
        The transfers. An owner learns the pairs of those that are shipped only.
    """
    ship, pairs, requested = header.unbind(-1)
    parts = message.long().split(request_lengths(numbers, topk))
    regions = [sum(requested for *_, requested in groups) for groups in numbers]
    cut = [part.tensor_split([count]) for part, count in zip(parts, regions, strict=True)]
    return Transfers(
        header=torch.stack((ship, pairs * ship, requested), -1),
        numbers=[[[ship, pairs * ship, requested] for ship, pairs, requested in groups] for groups in numbers],
        pair_slots=torch.cat([slots for _, slots in cut]).view(-1, topk),
        requested_region=torch.cat([regions for regions, _ in cut]),
    )
