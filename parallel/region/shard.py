"""A rank's part of sequences whose regions are sharded: only routed regions, or the queries that chose them, travel.

`plan_exchange` (plan.py) decides, `Transport` moves, `RoutedAttention` (attention.py) computes. Each transfer of a
plan, what one rank requests of one owner for one key/value head of one sequence, is one `partial_attention` over the
same queries and the same regions whether the regions were fetched or the queries shipped, and transfers merge in the
order of their owners. So on the CPU the way that a transfer travels changes no bit of the result, and what later
tokens choose changes no bit of an earlier one.

Shapes: B sequences, H query heads, G key/value heads, S tokens of this rank, P ranks, D head size, R regions of the
sequence, n descriptors of a region, N query blocks of this rank, K slots of a route.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from biroute.model.attention.grid import RegionGrid
from biroute.model.attention.suffix import suffix_attention
from biroute.parallel.region.attention import Exchange, RoutedAttention
from biroute.parallel.region.costs import RegionLayout
from biroute.parallel.region.plan import Way
from biroute.parallel.region.transport import Transport


class RegionShard:
    """One rank's part; the `SequenceShard` that the model's layers are handed. All methods are collective."""

    def __init__(self, layout: RegionLayout, transport: Transport, way: Way = "auto") -> None:
        """`way`: how regions of other ranks are reached, see `plan_exchange`."""
        assert transport.size == layout.num_ranks, (transport.size, layout)
        self.layout, self.transport, self.way = layout, transport, way
        self.first_token = layout.first_token(transport.rank)
        self.sequence_length = layout.num_regions * layout.region_size

    def all_key_descriptors(self, own: Tensor, layer: int) -> Tensor:
        """[B, G, R * n / P, D] of this rank's regions -> [B, G, R * n, D] of all. The choice carries no gradient."""
        gathered = self.transport.gather(layer, "descriptors", own)
        return gathered.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def key_before(self, k: Tensor, layer: int) -> Tensor:
        """k [B, G, S, D] -> [B, G, 1, D]: the last key of the rank before; zeros on the first. Differentiable."""
        return _FromRankBefore.apply(k[:, :, -1:], self.transport, layer)

    def routed_attention(
        self, q: Tensor, k: Tensor, v: Tensor, route: Tensor, grid: RegionGrid, layer: int
    ) -> Tensor:
        """Attend this rank's queries to the regions of their route, wherever those lie.

        Args:
            q: [B, H, S, D] of this rank's tokens.
            k: [B, G, S, D] the same.
            v: [B, G, S, D] the same.
            route: int64 [B, G, N, K] regions of the whole sequence.
            grid: sizes, causality and scale.
            layer: labels what is counted.

        Returns:
            [B, H, S, D]; differentiable.
        """
        exchange = Exchange(self.layout, self.transport, self.way, grid, layer)
        return RoutedAttention.apply(q.contiguous(), k.contiguous(), v.contiguous(), route, exchange)

    def dense_attention(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, layer: int) -> Tensor:
        """Attend this rank's queries to the whole sequence; shapes as above. Gathers all keys and values."""
        keys_and_values = torch.cat((k, v), -1).movedim(2, 0)  # [S, B, G, 2D]
        gathered = _GatherTokens.apply(keys_and_values, self.transport, layer).movedim(0, 2)
        k_all, v_all = gathered.split(k.shape[-1], -1)
        if causal:
            seen = self.first_token + q.shape[2]
            k_all, v_all = k_all[:, :, :seen], v_all[:, :, :seen]
        return suffix_attention(q, k_all, v_all, causal=causal)


class _FromRankBefore(torch.autograd.Function):
    """What the rank before holds, zeros on the first rank; backward hands the gradient back to it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, transport: Transport, layer: int) -> Tensor:
        ctx.transport, ctx.layer = transport, layer
        return transport.shift(layer, own, 1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return ctx.transport.shift(ctx.layer, upstream, -1), None, None


class _GatherTokens(torch.autograd.Function):
    """[S, ...] of each rank -> [P * S, ...]; backward sums the gradients of all ranks at the owner, in fp32."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, transport: Transport, layer: int) -> Tensor:
        ctx.transport, ctx.layer = transport, layer
        return transport.gather(layer, "gathered", own).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        parts = upstream if upstream.dtype == torch.float64 else upstream.float()
        return ctx.transport.sum_at_owners(ctx.layer, "gathered", parts).to(upstream.dtype), None, None
