"""The pages of a cache: what one sequence leaves in one layer, region by region. A page is a region.

A page holds the keys and values of L tokens for each key/value head, and the descriptors by which later query blocks
choose it. Nothing is copied when a token is added, and what is stored doubles in size when it is full.

Shapes: G key/value heads, D head size, S tokens of the sequence so far, L tokens of a region, R regions, n
descriptors of a region, K slots of a route, m real entries of a route, X tokens that a query attends to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from biroute.model.attention.grid import KERNEL_DEVICES
from biroute.model.attention.routing import (
    choose_regions,
    key_descriptors,
    query_descriptors,
    route_query_blocks,
)
from biroute.model.attention.rule import RouteRule
from biroute.model.decode.block_route import route_of_block


class Pages:
    """Keys and values of one sequence in one layer.

    Attributes:
        length: tokens of the sequence so far.
        last_key: [1, G, 1, D] the newest key before smearing, which the next one is smeared with; None at first.
        route: int64 [1, G, 1, K] of the query block that is not complete; None if there is none.
    """

    def __init__(self, region_size: int, longest: int) -> None:
        """Begin without a token.

        Args:
            region_size: L.
            longest: tokens that the sequence may have, a multiple of L.
        """
        self.region_size, self.longest = region_size, longest
        self.length = 0
        self.last_key: Tensor | None = None
        self.route: Tensor | None = None
        self._keys_GSD: Tensor | None = None
        self._values_GSD: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add the keys, smeared and rotated, and the values of the next tokens, [1, G, S, D] each.

        Raises:
            ValueError: the sequence would be longer than `longest`.
        """
        end = self.length + k.shape[2]
        if end > self.longest:
            raise ValueError(f"{end} tokens do not fit into pages for {self.longest}")
        self._keys_GSD = grown(self._keys_GSD, k[0], end, self.region_size, self.longest)
        self._values_GSD = grown(self._values_GSD, v[0], end, self.region_size, self.longest)
        self._keys_GSD[:, self.length : end] = k[0]
        self._values_GSD[:, self.length : end] = v[0]
        self.length = end

    def everything(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of all tokens, [G, S, D] each, without a copy."""
        keys_GSD, values_GSD = self._filled()
        return keys_GSD[:, : self.length], values_GSD[:, : self.length]

    def routed(self, route: Tensor) -> tuple[Tensor, Tensor]:
        """Gather the tokens of a route's regions up to the newest token, which lies in the last region of the route.

        Args:
            route: int64 [1, G, 1, K], ascending, -1 = empty.

        Returns:
            Keys and values, [G, X, D] each, in the order of the sequence.
        """
        keys_GSD, values_GSD = self._filled()
        own = (self.length - 1) // self.region_size
        # A causal block may choose any region before its own, so every head has as many real entries.
        real = min(route.shape[3], own + 1)
        route_Gm = route[0, :, 0, :real]
        num_groups, room = keys_GSD.shape[0], keys_GSD.shape[1] // self.region_size
        # Pages of all heads as rows of one table: whole rows are copied many times as fast as what `[]` would gather.
        place_Gm = route_Gm + torch.arange(num_groups, device=route.device)[:, None] * room
        seen = (real - 1) * self.region_size + self.length - own * self.region_size
        tables = (x.view(num_groups * room, -1) for x in (keys_GSD, values_GSD))
        pages = (table.index_select(0, place_Gm.flatten()) for table in tables)
        keys_GXD, values_GXD = (x.view(num_groups, -1, keys_GSD.shape[2])[:, :seen] for x in pages)
        return keys_GXD, values_GXD

    def size_bytes(self) -> int:
        """Return the bytes that keys and values of the sequence take so far, without what is kept free."""
        return sum(x[:, : self.length].numel() * x.element_size() for x in self._filled())

    def _filled(self) -> tuple[Tensor, Tensor]:
        assert self._keys_GSD is not None and self._values_GSD is not None, "no token has been added"
        return self._keys_GSD, self._values_GSD


class Candidates:
    """The descriptors of one sequence's complete regions in one layer, and the choice between them.

    They are in fp32, as they are defined.
    """

    def __init__(self, rule: RouteRule, longest: int, first_kv_head: int = 0) -> None:
        """Begin without a region; `rule` is the layer's, `longest` the tokens that the sequence may have."""
        self.rule, self.first_kv_head = rule, first_kv_head
        self._most = longest // rule.region_size
        self.num_regions = 0
        self._pending: Tensor | None = None  # [1, G, L, D] keys of the region that is not complete,
        self._num_pending = 0  # of which so many are there
        self._largest_norm = 0.0  # of a descriptor
        self._found: Tensor | None = None  # fp32 [n * G, R, D], or [G, R, n * D] for the GPU's router

    def add(self, k: Tensor) -> None:
        """Add the keys [1, G, S, D] of the next tokens, smeared, before or after RoPE as configured."""
        size = self.rule.region_size
        if self._pending is None:
            self._pending = k.new_empty((1, k.shape[1], size, k.shape[3]))
        while k.shape[2]:
            if self._num_pending == 0 and k.shape[2] >= size:
                complete = k.shape[2] // size * size
                self._store(k[:, :, :complete])
                k = k[:, :, complete:]
                continue
            taken = min(size - self._num_pending, k.shape[2])
            self._pending[:, :, self._num_pending : self._num_pending + taken] = k[:, :, :taken]
            self._num_pending, k = self._num_pending + taken, k[:, :, taken:]
            if self._num_pending == size:
                self._store(self._pending)
                self._num_pending = 0

    def choose(self, q: Tensor, token: int) -> Tensor:
        """Choose the route of the query block that begins at `token`; q [1, H, 1, D] is its first token's query.

        Returns:
            The route, int64 [1, G, 1, K], ascending, -1 = empty: the same as training's route of that block.
        """
        assert self._pending is not None
        rule, groups = self.rule, self._pending.shape[1]
        own = token // rule.region_size
        place = {"first_kv_head": self.first_kv_head}
        # The own region is no candidate: its descriptors, which are not complete, may be anything.
        self._reserve(own + 1)
        if self._fused():
            descriptors = self._descriptors()[:, : own + 1].unflatten(2, (rule.descriptors_per_region, -1))
            block = q.expand(-1, -1, rule.query_block_size, -1)
            return route_query_blocks(block, descriptors.flatten(1, 2)[None], rule, first_token=token, **place)
        queries = query_descriptors(q, groups, 1, causal=True)
        keys_nGRD = self._descriptors().unflatten(0, (rule.descriptors_per_region, groups))
        if rule.router == "affinity":
            return route_of_block(queries[0, :, 0], keys_nGRD[:, :, : own + 1], rule, self._largest_norm)
        number = token // rule.query_block_size
        return choose_regions(queries, keys_nGRD[:, None], rule, first_block=number, **place)

    def size_bytes(self) -> int:
        """Return the bytes that the descriptors take so far, without what is kept free."""
        stored = self._found
        return 0 if stored is None else stored[:, : self.num_regions].numel() * stored.element_size()

    def _store(self, k: Tensor) -> None:
        """Keep the descriptors of the keys [1, G, S, D] of whole regions."""
        size, count = self.rule.region_size, self.rule.descriptors_per_region
        found_GRnD = key_descriptors(k, size, count)[0].unflatten(1, (-1, count))
        first, self.num_regions = self.num_regions, self.num_regions + found_GRnD.shape[1]
        self._reserve(self.num_regions)
        if self._fused():
            self._descriptors()[:, first : self.num_regions] = found_GRnD.flatten(2)
            return
        self._descriptors()[:, first : self.num_regions] = found_GRnD.permute(2, 0, 1, 3).flatten(0, 1)
        self._largest_norm = max(self._largest_norm, float(found_GRnD.norm(dim=3).max()))

    def _reserve(self, regions: int) -> None:
        assert self._pending is not None
        _, groups, _, size = self._pending.shape
        count = self.rule.descriptors_per_region
        shape = (groups, 0, count * size) if self._fused() else (count * groups, 0, size)
        like = self._pending.new_empty(shape, dtype=torch.float32)
        self._found = grown(self._found, like, regions, 1, self._most)

    def _descriptors(self) -> Tensor:
        assert self._found is not None
        return self._found

    def _fused(self) -> bool:
        """Return whether the router of the GPU chooses, as in training; it takes descriptors in fp32."""
        assert self._pending is not None
        return self._pending.device.type in KERNEL_DEVICES


def grown(stored_GSD: Tensor | None, like_GSD: Tensor, needed: int, step: int, most: int) -> Tensor:
    """Return storage with room for `needed` tokens: as it is, or a copy of twice the size, filled with zeros.

    Args:
        stored_GSD: [G, S, D] what is stored now; None: nothing.
        like_GSD: its G, D, dtype and device are taken for the first storage.
        needed: S that it must have.
        step: S is a multiple of it.
        most: S that is never passed.
    """
    have = 0 if stored_GSD is None else stored_GSD.shape[1]
    if stored_GSD is not None and needed <= have:
        return stored_GSD
    wanted = min(most, max(needed, 2 * have))
    bigger_GSD = like_GSD.new_zeros((like_GSD.shape[0], -(-wanted // step) * step, like_GSD.shape[2]))
    if stored_GSD is not None:
        bigger_GSD[:, :have] = stored_GSD
    return bigger_GSD
