"""Attention over regions that are sharded across ranks: only routed regions, or the queries that chose them, travel.

`plan_exchange` (region_plan.py) decides; this module moves and computes. Each unit of a plan, what one rank wants of
one owner for one KV group of one sequence, is one `partial_attention` over the same queries and the same regions
whether the regions were fetched or the queries shipped, and units merge in the order of their owners: so the way that
a unit travels changes no bit of the result, and what later tokens choose changes no bit of an earlier one.

All payloads are rows of bytes in one all-to-all for each kind; those of forward are under way while the rank's own
regions are attended. Gradients of keys and values are summed in fp32 at the owner, requester by requester.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from biroute.model.attention.partial import RegionGrid
from biroute.model.attention.suffix import suffix_attention
from biroute.parallel.phase_clock import PhaseClock
from biroute.parallel.region.attention import routed_attention
from biroute.parallel.region.plan import (
    Baselines,
    ExchangePlan,
    RegionLayout,
    Units,
    Way,
    pack_requests,
    plan_exchange,
    request_lengths,
    unpack_requests,
)
from biroute.parallel.region.traffic_log import ExchangeLog

__all__ = ["ExchangePlan", "Pending", "RegionExchange", "RegionLayout", "plan_exchange"]


class RegionExchange:
    """The part of one rank in attention over sequences that the ranks of `group` share.

    It is the `SequenceShard` that the model's layers are handed. All methods are collective over `group`.
    """

    def __init__(
        self, layout: RegionLayout, group: dist.ProcessGroup, *, way: Way = "auto", clock: PhaseClock | None = None
    ) -> None:
        assert group.size() == layout.num_ranks, (group.size(), layout)
        self.layout, self.group, self.way = layout, group, way
        self.rank: int = group.rank()
        self.first_token = layout.first_token(self.rank)
        self.sequence_length = layout.num_regions * layout.region_size
        self.log = ExchangeLog(layout.num_ranks)
        self.clock = clock or PhaseClock()

    def all_key_descriptors(self, own: Tensor, layer: int) -> Tensor:
        """[B, G, R / P, D] of this rank's regions -> [B, G, R, D] of all. No gradient: the choice carries none."""
        gathered = own.new_empty(self.layout.num_ranks, *own.shape)
        with self.clock.phase("exchange"):
            dist.all_gather_into_tensor(gathered.flatten(0, 1), own.contiguous(), group=self.group)
        self.log.add_even(layer, "descriptors", self.rank, own.nbytes)
        return gathered.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def key_before(self, k: Tensor, layer: int) -> Tensor:
        """k [B, G, S / P, D] -> [B, G, 1, D]: the last key of the rank before; zeros on the first. Differentiable."""
        return _FromRankBefore.apply(k[:, :, -1:], self, layer)

    def routed_attention(
        self, q: Tensor, k: Tensor, v: Tensor, index: Tensor, grid: RegionGrid, layer: int
    ) -> Tensor:
        """Attention of this rank's queries over the regions of their route, wherever those lie.

        q [B, H, S / P, D], k, v [B, G, S / P, D] of this rank's tokens, index int64 [B, G, S / P / Lq, topk] of
        regions of the whole sequence -> out [B, H, S / P, D]; differentiable.
        """
        return routed_attention(self, q, k, v, index, grid, layer)

    def dense_attention(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, layer: int) -> Tensor:
        """Attention of this rank's queries over the whole sequence; shapes as above. Gathers all keys and values."""
        keys_and_values = torch.cat((k, v), -1).movedim(2, 0)  # [S / P, B, G, 2D]
        gathered = _GatherTokens.apply(keys_and_values, self, layer).movedim(0, 2)
        k_all, v_all = gathered.split(k.shape[-1], -1)
        if causal:
            seen = self.first_token + q.shape[2]
            k_all, v_all = k_all[:, :, :seen], v_all[:, :, :seen]
        return suffix_attention(q, k_all, v_all, causal=causal)

    def start(self, layer: int, kind: str, rows: Tensor, to: list[int], back: list[int]) -> Pending:
        """Send `to[p]` rows of `rows` [n, ...] to each rank p and receive `back[p]`; any dtype, as bytes."""
        width = rows.shape[1:].numel() * rows.element_size()
        sent = rows.contiguous().view(rows.shape[0], width // rows.element_size()).view(torch.uint8)
        received = sent.new_empty(sum(back), width)
        work = dist.all_to_all_single(received, sent, back, to, group=self.group, async_op=True)
        self.log.add(layer, kind, [n * width for n in to], [n * width for n in back])
        return Pending(self.clock, received.view(rows.dtype).view(-1, *rows.shape[1:]), sent, work)

    def request(self, plan: ExchangePlan, layer: int) -> Units:
        """Tell the owners what this rank wants; what the others want of it."""
        topk = plan.units.visit_slots.shape[1]
        header, message, lengths = pack_requests(plan.units)
        theirs = torch.empty_like(header)
        with self.clock.phase("exchange"):
            dist.all_to_all_single(theirs, header, group=self.group)
        self.log.add_even(layer, "requests", self.rank, header[0].nbytes)
        received = self.start(layer, "requests", message[:, None], lengths, request_lengths(theirs, topk)).wait()
        return unpack_requests(theirs, received.flatten(), topk)

    def record_plan(self, layer: int, plan: ExchangePlan, *, blocks: int, topk: int, causal: bool) -> None:
        """Note what the plan foresees beside the baselines."""
        baselines = Baselines.of(
            self.layout, self.rank, plan.costs, groups=plan.units.num_groups, blocks=blocks, topk=topk, causal=causal
        )
        self.log.add_plan(layer, plan, baselines)


class Pending:
    """An all-to-all under way."""

    def __init__(self, clock: PhaseClock, received: Tensor, sent: Tensor, work: Any) -> None:
        self._clock, self._received, self._sent, self._work = clock, received, sent, work

    def wait(self) -> Tensor:
        """The received rows, by sending rank."""
        with self._clock.phase("exchange"):
            self._work.wait()
        return self._received


class _FromRankBefore(torch.autograd.Function):
    """What the rank before holds, zeros on the first rank; backward hands the gradient back to it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, exchange: RegionExchange, layer: int) -> Tensor:
        ctx.exchange, ctx.layer = exchange, layer
        return _shifted(own, exchange, layer, 1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _shifted(upstream, ctx.exchange, ctx.layer, -1), None, None


def _shifted(own: Tensor, exchange: RegionExchange, layer: int, by: int) -> Tensor:
    """Each rank's tensor `by` ranks further on; zeros where nobody sends."""
    to, back = (
        [int(peer == exchange.rank + step) for peer in range(exchange.layout.num_ranks)] for step in (by, -by)
    )
    received = exchange.start(layer, "neighbours", own.flatten()[None][: sum(to)], to, back).wait()
    return received.view_as(own) if sum(back) else torch.zeros_like(own)


class _GatherTokens(torch.autograd.Function):
    """[S / P, ...] of each rank -> [S, ...]; backward sums the gradients of all ranks at the owner, in fp32."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, exchange: RegionExchange, layer: int) -> Tensor:
        ctx.exchange, ctx.layer = exchange, layer
        own = own.contiguous()
        gathered = own.new_empty(exchange.layout.num_ranks * own.shape[0], *own.shape[1:])
        with exchange.clock.phase("exchange"):
            dist.all_gather_into_tensor(
                gathered.view(-1).view(torch.uint8), own.view(-1).view(torch.uint8), group=exchange.group
            )
        exchange.log.add_even(layer, "gathered", exchange.rank, own.nbytes)
        return gathered

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        exchange = ctx.exchange
        parts = upstream.float().contiguous() if upstream.dtype != torch.float64 else upstream.contiguous()
        total = parts.new_empty(parts.shape[0] // exchange.layout.num_ranks, *parts.shape[1:])
        with exchange.clock.phase("exchange"):
            dist.reduce_scatter_tensor(total, parts, group=exchange.group)
        exchange.log.add_even(ctx.layer, "gathered", exchange.rank, total.nbytes)
        return total.to(upstream.dtype), None, None
