"""The bytes between the ranks that share a sequence: started, waited for, counted and timed. Knows no attention.

All payloads are rows of bytes in one all-to-all for each kind of payload.

Shapes: P ranks, n rows.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from biroute.parallel.phase_clock import PhaseClock
from biroute.parallel.region.traffic_log import TrafficLog
from biroute.parallel.region.transfers import Transfers, pack_requests, request_lengths, unpack_requests


class Pending:
    """An all-to-all under way."""

    def __init__(self, clock: PhaseClock, received: Tensor, sent: Tensor, work: dist.Work) -> None:
        # What is sent must stay alive until it has gone.
        self._clock, self._received, self._sent, self._work = clock, received, sent, work

    def wait(self) -> Tensor:
        """Wait for the received rows and return them, ordered by sending rank."""
        with self._clock.phase("comm_region"):
            self._work.wait()
        return self._received


class Transport:
    """Moves rows between the ranks of one group. Every method is collective over the group.

    `layer` and `kind` label what is counted; the kinds are those of `traffic_log.KINDS`.
    """

    def __init__(self, group: dist.ProcessGroup, clock: PhaseClock | None = None) -> None:
        self.group = group
        self.rank: int = group.rank()
        self.size: int = group.size()
        self.log = TrafficLog(self.size)
        self.clock = clock or PhaseClock()

    def start(self, layer: int, kind: str, rows: Tensor, to: list[int], back: list[int]) -> Pending:
        """Send `to[p]` rows of `rows` [n, ...] to each rank p and receive `back[p]`; any dtype, as bytes."""
        width = rows.shape[1:].numel() * rows.element_size()
        sent = rows.contiguous().view(rows.shape[0], width // rows.element_size()).view(torch.uint8)
        received = sent.new_empty(sum(back), width)
        work = dist.all_to_all_single(received, sent, back, to, group=self.group, async_op=True)
        assert work is not None, "only a rank outside of the group has nothing to wait for"
        self.log.add(layer, kind, [n * width for n in to], [n * width for n in back])
        return Pending(self.clock, received.view(rows.dtype).view(-1, *rows.shape[1:]), sent, work)

    def request(self, transfers: Transfers, topk: int, layer: int) -> Transfers:
        """Send every owner what this rank requests of it; returns what the others request of this rank."""
        header, message, lengths = pack_requests(transfers)
        theirs = torch.empty_like(header)
        with self.clock.phase("comm_region"):
            dist.all_to_all_single(theirs, header, group=self.group)
        self.log.add_even(layer, "requests", self.rank, header[0].nbytes)
        numbers = theirs.tolist()
        received = self.start(layer, "requests", message[:, None], lengths, request_lengths(numbers, topk)).wait()
        return unpack_requests(theirs, numbers, received.flatten(), topk)

    def gather(self, layer: int, kind: str, own: Tensor) -> Tensor:
        """[n, ...] of every rank, equally many, -> [P, n, ...]; any dtype, as bytes. Not differentiable."""
        own = own.contiguous()
        gathered = own.new_empty(self.size, *own.shape)
        with self.clock.phase("comm_region"):
            dist.all_gather_into_tensor(
                gathered.view(-1).view(torch.uint8), own.view(-1).view(torch.uint8), group=self.group
            )
        self.log.add_even(layer, kind, self.rank, own.nbytes)
        return gathered

    def sum_at_owners(self, layer: int, kind: str, parts: Tensor) -> Tensor:
        """[P * n, ...] of every rank -> the sum [n, ...] of this rank's part over all ranks."""
        total = parts.new_empty(parts.shape[0] // self.size, *parts.shape[1:])
        with self.clock.phase("comm_region"):
            dist.reduce_scatter_tensor(total, parts.contiguous(), group=self.group)
        self.log.add_even(layer, kind, self.rank, total.nbytes)
        return total

    def shift(self, layer: int, own: Tensor, by: int) -> Tensor:
        """Move every rank's tensor `by` ranks on; a rank to which none comes gets zeros."""
        to, back = ([int(peer == self.rank + step) for peer in range(self.size)] for step in (by, -by))
        received = self.start(layer, "neighbours", own.flatten()[None][: sum(to)], to, back).wait()
        return received.view_as(own) if sum(back) else torch.zeros_like(own)
