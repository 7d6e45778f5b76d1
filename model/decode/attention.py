"""Attention of a layer over the pages of its cache: for a prompt, and for one more token of some sequences.

The route is that of training. A causal query block may choose only regions that lie wholly before its own, and its
descriptor is the query of its first token, so everything that the choice depends on is known when that token comes;
the block's later tokens keep the route (docs/routing.md).

Shapes: B sequences, H query heads, G key/value heads, r = H / G, h = r + 2 for a group's query heads, key and value,
D head size, E = 2 D for a key and the value after it, S tokens of the prompt, X tokens that a query attends to, K
slots of a route.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from biroute.configs.schema import ModelConfig
from biroute.model.attention.core import CoreAttention
from biroute.model.attention.rope import rotate_token, token_rows
from biroute.model.decode.block_route import ascending
from biroute.model.decode.pages import Candidates, Pages


class LayerCache:
    """What one sequence leaves in one layer: its pages, and the candidates of its routes if the layer chooses any."""

    def __init__(self, core: CoreAttention) -> None:
        model = core.model
        self.pages = Pages(model.attention.region_size, model.sequence_length)
        self.candidates = None
        if core.rule is not None:
            self.candidates = Candidates(core.rule, model.sequence_length, core.first_kv_head)
        self._share_G1D = (
            None if core.key_smear is None else core.key_smear.share.detach().view(core.num_kv_heads, 1, -1)
        )

    def smeared(self, k: Tensor) -> Tensor:
        """Smear the key [1, G, 1, D] of the next token, as `KeySmear` does, and keep it for the one after it."""
        last, self.pages.last_key = self.pages.last_key, k
        assert last is not None
        return k if self._share_G1D is None else k + self._share_G1D * last

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
            pages.follow(route[:, :, block : block + 1].clone())
        return core.attend_exactly(turned, v, route) if self.exact else core.attend(turned, v, route)

    def attend_heads(self, core: CoreAttention, heads_SGhD: Tensor) -> Tensor:
        """Attend the heads of the prompt's tokens as a projection leaves them; gives [S, H * D]."""
        q, k, v = heads_SGhD.split((heads_SGhD.shape[2] - 2, 1, 1), 2)
        out_1HSD = self.attend(core, *(x.flatten(1, 2).transpose(0, 1)[None] for x in (q, k, v)))
        return out_1HSD[0].transpose(0, 1).flatten(1)


class TokenAttention:
    """Attends one more token of each of some sequences, each by itself: no sequence knows of the others."""

    def __init__(self, caches: Sequence[LayerCache], exact: bool) -> None:
        """Use one cache for each of the first rows of a call; the rows after them are padding, and give zeros.

        `exact`: see `CoreAttention.attend_exactly`.
        """
        self.caches, self.exact = caches, exact

    def attend(self, core: CoreAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend q [B, H, 1, D], k and v [B, G, 1, D], before RoPE, to themselves and what came before."""
        heads_BGhD = torch.cat((q.reshape(len(q), k.shape[1], -1, q.shape[3]), k, v), 2)
        return self.attend_heads(core, heads_BGhD).view_as(q)

    def attend_heads(self, core: CoreAttention, heads_BGhD: Tensor) -> Tensor:
        """Attend the heads of one token of each sequence as a projection leaves them; gives [B, H * D]."""
        if len(heads_BGhD) == 1:
            return self._attend_row(core, self.caches[0], heads_BGhD)
        rows = heads_BGhD.split(1)
        found = [self._attend_row(core, cache, row) for cache, row in zip(self.caches, rows, strict=False)]
        padding = found[0].new_zeros((len(rows) - len(found), found[0].shape[1]))
        return torch.cat((*found, padding))

    def _attend_row(self, core: CoreAttention, cache: LayerCache, heads_1GhD: Tensor) -> Tensor:
        """Attend the token of one sequence; gives [1, H * D]."""
        q_1GrD, pairs_1GXE = _seen_by_token(core, cache, heads_1GhD)
        if self.exact:
            q_1GrD, pairs_1GXE = q_1GrD.double(), pairs_1GXE.double()
        size = q_1GrD.shape[3]
        keys, values = pairs_1GXE.split_with_sizes((size, size), 3)
        # The query heads of a group stand where tokens would: its keys are read once for all of them.
        out_1GrD = F.scaled_dot_product_attention(q_1GrD, keys, values)
        return out_1GrD.reshape(1, -1).to(heads_1GhD.dtype)


def _seen_by_token(core: CoreAttention, cache: LayerCache, heads_1GhD: Tensor) -> tuple[Tensor, Tensor]:
    """Add the next token of one sequence, and find what it attends to.

    Returns:
        Its queries after RoPE, [1, G, r, D], and keys and values [1, G, X, 2 D].
    """
    pages, token, r = cache.pages, cache.pages.length, heads_1GhD.shape[2] - 2
    q, k, v = heads_1GhD.split_with_sizes((r, 1, 1), 2)
    smeared = cache.smeared(k)
    model = core.model
    table = token_rows(token, model.sequence_length, model.head_size, model.rope_base, k.device)
    rotated = rotate_token(torch.cat((q, smeared), 2), *table)
    rotated_q, rotated_k = rotated.split_with_sizes((r, 1), 2)
    pages.append(rotated_k, v)
    if core.kind == "dense":
        return rotated_q, pages.everything()
    q_for_route, k_for_route = core.for_route((q, smeared), (rotated_q, rotated_k))
    if cache.candidates is not None:
        # A region that becomes complete now is nobody's candidate before the next token, whose own region it is not.
        cache.candidates.add(k_for_route)
    if token % core.query_block_size == 0:
        pages.follow(_choose(core, cache, q_for_route, token))
    return rotated_q, pages.routed()


def _choose(core: CoreAttention, cache: LayerCache, q: Tensor, token: int) -> Tensor:
    """Choose the route of the block that begins at `token`, q [1, G, r, D], as `Pages` takes it; tell `on_route`."""
    if core.router is not None:
        raise ValueError("a router of one's own chooses for whole sequences; it cannot choose token by token")
    if cache.candidates is not None:
        route = cache.candidates.choose(q, token)
    else:
        route = sliding_window(core.model, token, q.device).expand(1, core.num_kv_heads, 1, -1)
    if core.on_route is not None:
        core.on_route(core.layer, ascending(route))
    return route


def sliding_window(model: ModelConfig, token: int, device: torch.device) -> Tensor:
    """Return the route [K] of `kind: sliding_window` for a token: its own region and those before it, -1 = empty."""
    attention = model.attention
    own = token // attention.region_size
    region_K = torch.arange(attention.topk, device=device) + max(0, own - attention.topk + 1)
    return region_K.masked_fill(region_K > own, -1)
