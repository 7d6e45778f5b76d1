"""Attention of a few tokens at a time, with the state that earlier tokens left: for generation.

The state of a layer holds the keys and values of all tokens so far, the descriptors of the complete regions, and the
keys of the incomplete one. A causal query may choose only complete regions before its own, so decoding chooses the
same regions as a forward pass over the whole sequence, and attends to the same tokens.

Shapes: B sequences, H query heads, G key/value heads, D head size, S new tokens, `length` tokens so far, L tokens of
a region, K slots of a route, n descriptors of a region.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from biroute.model.attention.core import CoreAttention
from biroute.model.attention.routing import key_descriptors, route_query_blocks


@dataclass
class DecodeState:
    """The state of one layer after the tokens so far."""

    keys: Tensor | None = None  # [B, G, length, D], smeared and rotated
    values: Tensor | None = None  # [B, G, length, D]
    last_key: Tensor | None = None  # [B, G, 1, D], before smearing: needed to smear the next key
    pending: Tensor | None = None  # [B, G, length % L, D] keys of the incomplete region, for its descriptors
    descriptors: Tensor | None = None  # fp32 [B, G, length // L * n, D] of the complete regions
    block_route: Tensor | None = None  # int64 [B, G, 1, K] of the query block that is not complete

    @property
    def length(self) -> int:
        """Return the number of tokens so far."""
        return 0 if self.keys is None else self.keys.shape[2]

    @torch.no_grad()
    def attend(self, core: CoreAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend new tokens to themselves and to all tokens before them, and add them to the state.

        Args:
            core: the layer's attention.
            q: [B, H, S, D] of the new tokens, before RoPE.
            k: [B, G, S, D] the same.
            v: [B, G, S, D].

        Returns:
            [B, H, S, D].

        Raises:
            ValueError: the model is bidirectional, or ranks share the sequence.
        """
        if not core.model.causal or core.shard is not None:
            raise ValueError("a state needs a causal model whose sequences are whole; MLM and region ranks have none")
        first = self.length
        if core.key_smear is not None:
            k, self.last_key = core.key_smear(k, self.last_key), k[:, :, -1:]
        rotated_q, rotated_k = core.rotate(q, first), core.rotate(k, first)
        self.keys, self.values = _joined(self.keys, rotated_k), _joined(self.values, v)
        if core.kind == "dense":
            return self._attend_all(rotated_q, first)
        before = core.model.attention.descriptor == "pre_rope"
        for_route = (q, k) if before else (rotated_q, rotated_k)
        outs = []
        for start, end in _blocks(first, q.shape[2], core.query_block_size):
            part = slice(start - first, end - first)
            route = self._route(core, for_route[0][:, :, part], for_route[1][:, :, part], start)
            outs.append(self._attend_route(core, rotated_q[:, :, part], route, start))
        return torch.cat(outs, 2)

    def _route(self, core: CoreAttention, q: Tensor, k: Tensor, start: int) -> Tensor:
        """Return the route [B, G, 1, K] of the query block with the tokens from `start` on, and keep their keys."""
        if start % core.query_block_size == 0:
            self.block_route = self._choose(core, q, k, start)
            if core.on_route is not None:
                core.on_route(core.layer, self.block_route)
        self._keep(core, k)
        assert self.block_route is not None
        return self.block_route

    def _choose(self, core: CoreAttention, q: Tensor, k: Tensor, start: int) -> Tensor:
        """Choose the route of the block that begins at `start`."""
        attention = core.model.attention
        if core.rule is None:
            own = start // attention.region_size
            window = range(max(0, own - attention.topk + 1), own + 1)
            route = torch.tensor([*window, *[-1] * (attention.topk - len(window))], device=q.device)
            return route.expand(k.shape[0], k.shape[1], 1, -1)
        # The own region is not a candidate, so its descriptors are not used; the descriptor of a block is its first
        # query.
        own_descriptors = k.new_zeros(*k.shape[:2], core.rule.descriptors_per_region, k.shape[3], dtype=torch.float32)
        return route_query_blocks(
            q[:, :, :1].expand(-1, -1, core.rule.query_block_size, -1),
            _joined(self.descriptors, own_descriptors),
            core.rule,
            first_token=start,
            first_kv_head=core.first_kv_head,
        )

    def _keep(self, core: CoreAttention, k: Tensor) -> None:
        """Add keys to the incomplete region, and compute its descriptors once it is complete."""
        if core.rule is None:
            return
        self.pending = _joined(self.pending, k)
        complete = self.pending.shape[2] // core.rule.region_size * core.rule.region_size
        if complete:
            found = key_descriptors(
                self.pending[:, :, :complete], core.rule.region_size, core.rule.descriptors_per_region
            )
            self.descriptors = _joined(self.descriptors, found)
            self.pending = self.pending[:, :, complete:]

    def _attend_all(self, q: Tensor, first: int) -> Tensor:
        assert self.keys is not None and self.values is not None
        query = torch.arange(first, first + q.shape[2], device=q.device)
        seen = torch.arange(self.length, device=q.device) <= query[:, None]
        grouped = q.shape[1] != self.keys.shape[1]
        return scaled_dot_product_attention(q, self.keys, self.values, attn_mask=seen, enable_gqa=grouped)

    def _attend_route(self, core: CoreAttention, q: Tensor, route: Tensor, start: int) -> Tensor:
        """Attend q [B, H, S, D] of one block, from token `start` on, to the tokens of the route [B, G, 1, K]."""
        assert self.keys is not None and self.values is not None
        size, kv_heads = core.model.attention.region_size, route.shape[1]
        token = (route[:, :, 0, :, None] * size + torch.arange(size, device=q.device)).flatten(2)  # [B, G, K * L]
        query = torch.arange(start, start + q.shape[2], device=q.device)
        real = (route[:, :, 0] >= 0).repeat_interleave(size, 2)
        seen = (real[:, :, None] & (token[:, :, None] <= query[:, None])).repeat_interleave(q.shape[1] // kv_heads, 1)
        position = token.clamp(0, self.length - 1)[..., None].expand(-1, -1, -1, q.shape[3])
        k, v = self.keys.gather(2, position), self.values.gather(2, position)
        return scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=q.shape[1] != kv_heads)


def _joined(earlier: Tensor | None, new: Tensor) -> Tensor:
    return new if earlier is None else torch.cat((earlier, new), 2)


def _blocks(first: int, count: int, size: int) -> list[tuple[int, int]]:
    """Cut the tokens first ... first + count - 1 at the edges of query blocks: (start, end) of each part."""
    edges = sorted({first, first + count, *range(first - first % size + size, first + count, size)})
    return list(pairwise(edges))
