"""The attention of one layer: key smearing, rotary embedding, the route, and attention over it.

Shapes: B sequences, S tokens of this rank, H query heads and G key/value heads of this rank, D head size, N query
blocks, K slots of a route.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from biroute.configs.schema import ModelConfig
from biroute.model.attention.bi_level import bi_level_attention, dense_attention
from biroute.model.attention.grid import KERNEL_DEVICES, RegionGrid
from biroute.model.attention.key_smear import KeySmear
from biroute.model.attention.rope import apply_rotary, rotary_tables
from biroute.model.attention.routing import key_descriptors, route_query_blocks, sliding_window_route
from biroute.model.attention.rule import RouteRule
from biroute.model.attention.sequence_shard import SequenceShard

# Called with the number of the layer (from 0) and the route [B, G, N, K] that was chosen.
OnRoute = Callable[[int, Tensor], None]
# Queries [B, H, S, D] and keys [B, G, S, D] that descriptors are made of -> the route [B, G, N, K].
Router = Callable[[Tensor, Tensor], Tensor]


Pair = tuple[Tensor, Tensor]  # queries [B, H, S, D] and keys [B, G, S, D]


class Turned(NamedTuple):
    """Queries and keys of a layer, and those that descriptors are made of."""

    q: Tensor  # [B, H, S, D], RoPE applied
    k: Tensor  # [B, G, S, D], smeared, RoPE applied
    for_route: Pair


class AttentionState(Protocol):
    """What takes the place of a layer's attention while text is generated: see `biroute.model.decode`."""

    def attend(self, core: CoreAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend new tokens, shaped as in `CoreAttention.forward`, to themselves and to all tokens before them."""


def route_rule(model: ModelConfig, layer: int) -> RouteRule:
    """Return how block `layer` (from 0) chooses its regions, if its kind is bi_level."""
    attention = model.attention
    return RouteRule(
        region_size=attention.region_size,
        query_block_size=attention.query_block_size,
        topk=attention.topk,
        causal=model.causal,
        force_own=attention.force_own,
        force_previous=attention.force_previous,
        attention_sink=attention.attention_sink,
        router=attention.router,
        seed=layer + 1,  # for router=random: every layer draws other routes
        descriptors_per_region=attention.descriptors_per_region,
    )


class CoreAttention(nn.Module):
    """Attention of queries, keys and values as they come out of a layer's projections.

    Its only weights are those of key smearing. It gets queries and keys before RoPE, so that the route can depend on
    content alone.

    Attributes:
        rule: how the route of a bi_level layer is chosen; None for other kinds. May be replaced at any time.
        router: chooses the route instead of `rule`, if set; the route must be as `route_query_blocks` gives it.
        on_route: called with every route that is chosen, if set; it must not change the route.
        state: if set, it attends instead, with the keys and values of earlier calls.
    """

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        *,
        num_kv_heads: int,
        first_kv_head: int = 0,
        shard: SequenceShard | None = None,
        exact: bool = False,
    ) -> None:
        """Build the attention of one layer.

        Args:
            model: the model.
            layer: the number of the block, from 0.
            num_kv_heads: key/value heads of this tensor rank.
            first_kv_head: the number of the first one among those of all tensor ranks.
            shard: access to the rest of the sequences, where ranks share them.
            exact: attend as `attend_exactly` does, on CPUs in fp32.
        """
        super().__init__()
        self.model = model
        self.layer = layer
        self.exact = exact
        self.kind = model.attention_kind(layer)
        self.rule = route_rule(model, layer) if self.kind == "bi_level" else None
        self.num_kv_heads, self.first_kv_head, self.shard = num_kv_heads, first_kv_head, shard
        self.first_token = 0 if shard is None else shard.first_token
        self.key_smear = KeySmear(num_kv_heads, model.head_size) if model.key_smear else None
        self.router: Router | None = None
        self.on_route: OnRoute | None = None
        self.state: AttentionState | None = None

    @property
    def query_block_size(self) -> int:
        """Tokens that share a route: a sliding window has one route per region."""
        attention = self.model.attention
        return attention.region_size if self.kind == "sliding_window" else attention.query_block_size

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend queries to keys and values.

        Args:
            q: [B, H, S, D] this rank's tokens, before RoPE.
            k: [B, G, S, D] the same.
            v: [B, G, S, D].

        Returns:
            [B, H, S, D].
        """
        if self.state is not None:
            return self.state.attend(self, q, k, v)
        if self.key_smear is not None:
            k = self.key_smear(k, None if self.shard is None else self.shard.key_before(k, self.layer))
        turned = self.turn(q, k)
        exactly = self.exact and q.device.type == "cpu" and q.dtype == torch.float32
        attend = self.attend_exactly if exactly else self.attend
        return attend(turned, v, self.route(*turned.for_route))

    def turn(self, q: Tensor, k: Tensor) -> Turned:
        """Apply RoPE to queries [B, H, S, D] and smeared keys [B, G, S, D] of this rank's tokens."""
        rotated = self.rotate(q, self.first_token), self.rotate(k, self.first_token)
        return Turned(*rotated, self.for_route((q, k), rotated))

    def for_route(self, content: Pair, rotated: Pair) -> Pair:
        """Choose which queries and keys the descriptors are made of: those before RoPE, or those after it."""
        return content if self.model.attention.descriptor == "pre_rope" else rotated

    def attend(self, turned: Turned, v: Tensor, route: Tensor | None) -> Tensor:
        """Attend over the route [B, G, N, K], or to all tokens without one; v [B, G, S, D] -> [B, H, S, D]."""
        q = turned.q
        if route is None or (q.device.type in KERNEL_DEVICES and self._routes_everything(q)):
            return self._dense(q, turned.k, v)
        return self._routed(q, turned.k, v, route)

    def attend_exactly(self, turned: Turned, v: Tensor, route: Tensor | None) -> Tensor:
        """Attend as `attend` does, in fp64, rounded to fp32 at the end.

        Sums in fp64, rounded once, have the same bits in whatever order and shape they are computed, but for one in
        many millions. So a prompt, one token and a whole sequence leave the same hidden states, bit for bit, and
        later layers choose the same regions. In fp32 the last bits would differ, and decide between regions that are
        equally near, as regions are where a text repeats itself.
        """
        doubled = Turned(turned.q.double(), turned.k.double(), turned.for_route)
        return self.attend(doubled, v.double(), route).to(v.dtype)

    def rotate(self, x: Tensor, first_token: int) -> Tensor:
        """Apply RoPE.

        Args:
            x: [B, H, S, D] or [B, G, S, D].
            first_token: the position of the first token.

        Returns:
            The same shape and dtype.
        """
        return apply_rotary(x, *rotary_tables(x.shape[2], first_token, x.shape[3], self.model.rope_base, x.device))

    def route(self, q: Tensor, k: Tensor) -> Tensor | None:
        """Choose the regions of each query block, and pass them to `on_route`; a dense layer has no route.

        Args:
            q: [B, H, S, D] this rank's tokens, before or after RoPE, as configured.
            k: [B, G, S, D] the same, smeared.

        Returns:
            int64 [B, G, N, K] regions of the whole sequence, ascending, -1 = empty; None in a dense layer.
        """
        if self.kind == "dense":
            return None
        if self.router is not None:
            route = self.router(q, k)
        elif self.rule is None:
            route = self._sliding_window(k)
        else:
            descriptors = key_descriptors(k, self.rule.region_size, self.rule.descriptors_per_region)
            if self.shard is not None:
                descriptors = self.shard.all_key_descriptors(descriptors, self.layer)
            route = route_query_blocks(
                q, descriptors, self.rule, first_token=self.first_token, first_kv_head=self.first_kv_head
            )
        if self.on_route is not None:
            self.on_route(self.layer, route)
        return route

    def _routes_everything(self, q: Tensor) -> bool:
        """Return whether every query sees all regions (if causal, all up to its own): the same as dense attention."""
        length = q.shape[2] if self.shard is None else self.shard.sequence_length
        return self.rule is not None and self.router is None and self.rule.topk * self.rule.region_size >= length

    def _sliding_window(self, k: Tensor) -> Tensor:
        batch, kv_heads, num_tokens, _ = k.shape
        return sliding_window_route(
            batch=batch,
            kv_heads=kv_heads,
            num_tokens=num_tokens,
            region_size=self.model.attention.region_size,
            query_block_size=self.query_block_size,
            topk=self.model.attention.topk,
            causal=self.model.causal,
            first_token=self.first_token,
            sequence_length=num_tokens if self.shard is None else self.shard.sequence_length,
            device=k.device,
        )

    def _dense(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.shard is not None:
            return self.shard.dense_attention(q, k, v, causal=self.model.causal, layer=self.layer)
        return dense_attention(q, k, v, causal=self.model.causal)

    def _routed(self, q: Tensor, k: Tensor, v: Tensor, route: Tensor) -> Tensor:
        size, block, causal = self.model.attention.region_size, self.query_block_size, self.model.causal
        if self.shard is not None:
            grid = RegionGrid(size, block, causal, q.shape[3] ** -0.5)
            return self.shard.routed_attention(q, k, v, route, grid, self.layer)
        return bi_level_attention(q, k, v, route, region_size=size, query_block_size=block, causal=causal)
