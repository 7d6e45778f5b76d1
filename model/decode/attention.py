"""Attention of a layer over the pages of its cache: for a prompt, and for one more token of some sequences.

The route is that of training. A causal query block may choose only regions that lie wholly before its own, and its
descriptor is the query of its first token, so everything that the choice depends on is known when that token comes;
the block's later tokens keep the route (docs/routing.md).

Shapes: B sequences, H query heads, G key/value heads, r = H / G, D head size, S tokens of the prompt, X tokens that a
query attends to, K slots of a route.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from biroute.configs.schema import ModelConfig
from biroute.model.attention.core import CoreAttention
from biroute.model.attention.rope import rotary_tables, rotate
from biroute.model.decode.pages import Candidates, Pages


class LayerCache:
    """What one sequence leaves in one layer: its pages, and the candidates of its routes if the layer chooses any."""

    def __init__(self, core: CoreAttention) -> None:
        model = core.model
        self.pages = Pages(model.attention.region_size, model.sequence_length)
        self.candidates = None
        if core.rule is not None:
            self.candidates = Candidates(core.rule, model.sequence_length, core.first_kv_head)

    def size_bytes(self) -> int:
        """Return the bytes that keys, values and descriptors take so far."""
        return self.pages.size_bytes() + (self.candidates.size_bytes() if self.candidates else 0)


class PromptAttention:
    """Attends the tokens of a prompt exactly as training does, and keeps what later tokens need.

    The prompt is padded at its end to whole regions. No token of a causal model sees a later one, so the padding
    changes nothing; it is not kept.
    """

    def __init__(self, cache: LayerCache, length: int, exact: bool) -> None:
        """Fill an empty `cache` with the first `length` tokens of the call.

        `exact`: see `CoreAttention.attend_exactly`.
        """
        self.cache, self.length, self.exact = cache, length, exact

    def attend(self, core: CoreAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend q [1, H, S, D] to k, v [1, G, S, D], before RoPE, S a multiple of the region; gives [1, H, S, D]."""
        smeared = k if core.key_smear is None else core.key_smear(k)
        turned = core.turn(q, smeared)
        route = core.route(*turned.for_route)
        pages, end = self.cache.pages, self.length
        pages.append(turned.k[:, :, :end], v[:, :, :end])
        pages.last_key = k[:, :, end - 1 : end].clone()
        if self.cache.candidates is not None:
            self.cache.candidates.add(turned.for_route[1][:, :, :end])
        if route is not None and end % core.query_block_size:
            block = end // core.query_block_size
            pages.route = route[:, :, block : block + 1].clone()
        return core.attend_exactly(turned, v, route) if self.exact else core.attend(turned, v, route)


class TokenAttention:
    """Attends one more token of each of some sequences, each by itself: no sequence knows of the others."""

    def __init__(self, caches: Sequence[LayerCache], exact: bool) -> None:
        """Use one cache for each of the first rows of a call; the rows after them are padding, and give zeros.

        `exact`: see `CoreAttention.attend_exactly`.
        """
        self.caches, self.exact = caches, exact

    def attend(self, core: CoreAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend q [B, H, 1, D], k and v [B, G, 1, D], before RoPE, to themselves and what came before."""
        if q.shape[0] == 1:
            return self._attend_row(core, self.caches[0], q, k, v)
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        for b, cache in enumerate(self.caches):
            row = slice(b, b + 1)
            out[row] = self._attend_row(core, cache, q[row], k[row], v[row])
        return out

    def _attend_row(self, core: CoreAttention, cache: LayerCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend the token of one sequence, [1, heads, 1, D] each; gives [1, H, 1, D]."""
        rotated_q, keys_GXD, values_GXD = _seen_by_token(core, cache, q, k, v)
        if not self.exact:
            return _softmax_attention(rotated_q, keys_GXD, values_GXD)
        return _softmax_attention(rotated_q.double(), keys_GXD.double(), values_GXD.double()).to(q.dtype)


def _seen_by_token(
    core: CoreAttention, cache: LayerCache, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the next token of one sequence, and find what it attends to.

    Takes q [1, H, 1, D], k and v [1, G, 1, D]; returns q after RoPE, and keys and values [G, X, D].
    """
    pages, token = cache.pages, cache.pages.length
    smeared = k if core.key_smear is None else core.key_smear(k, pages.last_key)
    pages.last_key = k
    # Rows of one table for all positions, which is what training uses, and is computed once.
    model = core.model
    tables = rotary_tables(model.sequence_length, 0, model.head_size, model.rope_base, q.device)
    cosines, sines = (table[token : token + 1] for table in tables)
    rotated = rotate(torch.cat((q, smeared), 1), cosines, sines)
    rotated_q, rotated_k = rotated.split((q.shape[1], k.shape[1]), 1)
    pages.append(rotated_k, v)
    if core.kind == "dense":
        return rotated_q, *pages.everything()
    q_for_route, k_for_route = core.for_route((q, smeared), (rotated_q, rotated_k))
    if cache.candidates is not None:
        # A region that becomes complete now is nobody's candidate before the next token, whose own region it is not.
        cache.candidates.add(k_for_route)
    if token % core.query_block_size == 0:
        pages.route = _choose(core, cache, q_for_route, token)
    assert pages.route is not None
    return rotated_q, *pages.routed(pages.route)


def _choose(core: CoreAttention, cache: LayerCache, q: Tensor, token: int) -> Tensor:
    """Choose the route [1, G, 1, K] of the block that begins at `token`, and pass it to `on_route`."""
    if core.router is not None:
        raise ValueError("a router of one's own chooses for whole sequences; it cannot choose token by token")
    if cache.candidates is not None:
        route = cache.candidates.choose(q, token)
    else:
        route = sliding_window(core.model, token, q.device).expand(1, core.num_kv_heads, 1, -1)
    if core.on_route is not None:
        core.on_route(core.layer, route)
    return route


def sliding_window(model: ModelConfig, token: int, device: torch.device) -> Tensor:
    """Return the route [K] of `kind: sliding_window` for a token: its own region and those before it, -1 = empty."""
    attention = model.attention
    own = token // attention.region_size
    region_K = torch.arange(attention.topk, device=device) + max(0, own - attention.topk + 1)
    return region_K.masked_fill(region_K > own, -1)


def _softmax_attention(q: Tensor, keys_GXD: Tensor, values_GXD: Tensor) -> Tensor:
    """Attend q [1, H, 1, D] to all the keys given, of each group for its r query heads; gives [1, H, 1, D]."""
    q_GrD = q.reshape(keys_GXD.shape[0], -1, q.shape[3]) * q.shape[3] ** -0.5
    scores_GrX = q_GrD @ keys_GXD.transpose(1, 2)
    precision = torch.promote_types(scores_GrX.dtype, torch.float32)
    weights_GrX = torch.softmax(scores_GrX, -1, dtype=precision).to(values_GXD.dtype)
    return (weights_GrX @ values_GXD).reshape(q.shape)
