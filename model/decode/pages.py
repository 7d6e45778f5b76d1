"""The pages of a cache: what one sequence leaves in one layer, region by region. A page is a region.

A page holds the keys and values of L tokens for each key/value head, and the descriptors by which later query blocks
choose it. Nothing is copied when a token is added, and what is stored doubles in size when it is full.

Shapes: G key/value heads, r query heads of each, D head size, E = 2 D for a key and the value after it, S tokens of
the sequence so far, L tokens of a region, R regions, n descriptors of a region, K slots of a route, m real entries of
a route, X tokens that a query attends to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from biroute.model.attention.grid import KERNEL_DEVICES
from biroute.model.attention.routing import choose_regions, exact_mean, key_descriptors, route_query_blocks
from biroute.model.attention.rule import RouteRule
from biroute.model.decode.block_route import BlockRouter, query_of_block


class Pages:
    """Keys and values of one sequence in one layer.

    Attributes:
        length: tokens of the sequence so far.
        last_key: [1, G, 1, D] the newest key before smearing, which the next one is smeared with; None at first.
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
        # Each key is followed by its value, so that a page is a single row of memory.
        self._pairs_1GSE: Tensor | None = None
        # Pages of all heads as rows of one table: whole rows are copied many times as fast as what `[]` would gather.
        self._table: Tensor | None = None
        self._first_row_G1: Tensor | None = None  # of each head in the table
        self._route: Tensor | None = None
        self._rows: Tensor | None = None  # of the route's pages in the table, once they were asked for

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add the keys, smeared and rotated, and the values of the next tokens, [1, G, S, D] each.

        Raises:
            ValueError: the sequence would be longer than `longest`.
        """
        end = self.length + k.shape[2]
        if end > self.longest:
            raise ValueError(f"{end} tokens do not fit into pages for {self.longest}")
        if self._pairs_1GSE is None or end > self._pairs_1GSE.shape[2]:
            self._grow(end, k)
        torch.cat((k, v), 3, out=self._filled().narrow(2, self.length, k.shape[2]))
        self.length = end

    def everything(self) -> Tensor:
        """Return keys and values of all tokens, [1, G, S, 2 D], without a copy."""
        return self._filled().narrow(2, 0, self.length)

    def follow(self, route: Tensor) -> None:
        """Take the route of the query block that the newest token is the first of, or that is not complete.

        Args:
            route: int64 [1, G, 1, K] regions, the own one last, then -1 = empty. It may change after the block.
        """
        self._route, self._rows = route, None

    def routed(self) -> Tensor:
        """Gather the tokens of the route's regions up to the newest token, which lies in the last one of them.

        Returns:
            Keys and values, [1, G, X, 2 D].
        """
        pairs_1GSE, size = self._filled(), self.region_size
        assert self._table is not None and self._first_row_G1 is not None and self._route is not None
        own = (self.length - 1) // size
        # A causal block may choose any region before its own, so every head has as many real entries.
        real = min(self._route.shape[3], own + 1)
        if self._rows is None:
            route_Gm = self._route.reshape(pairs_1GSE.shape[1], -1).narrow(1, 0, real)
            self._rows = (route_Gm + self._first_row_G1).view(-1)
        pages = self._table.index_select(0, self._rows)
        seen = (real - 1) * size + self.length - own * size
        return pages.view(1, pairs_1GSE.shape[1], real * size, -1).narrow(2, 0, seen)

    def size_bytes(self) -> int:
        """Return the bytes that keys and values of the sequence take so far, without what is kept free."""
        return self.everything().numel() * self._filled().element_size()

    def _grow(self, needed: int, k: Tensor) -> None:
        """Make room for so many tokens with keys like `k`."""
        groups, size = k.shape[1], self.region_size
        stored_GSE = k.new_empty((groups, 0, 2 * k.shape[3])) if self._pairs_1GSE is None else self._pairs_1GSE[0]
        stored_GSE = grown(stored_GSE, needed, size, self.longest)
        self._pairs_1GSE, self._rows = stored_GSE[None], None
        self._table = stored_GSE.view(-1, size * stored_GSE.shape[2])
        self._first_row_G1 = torch.arange(groups, device=k.device)[:, None] * (stored_GSE.shape[1] // size)

    def _filled(self) -> Tensor:
        assert self._pairs_1GSE is not None, "no token has been added"
        return self._pairs_1GSE


class Candidates:
    """The descriptors of one sequence's complete regions in one layer, and the choice between them.

    They are in fp32, as they are defined.
    """

    def __init__(self, rule: RouteRule, longest: int, first_kv_head: int = 0) -> None:
        """Begin without a region; `rule` is the layer's, `longest` the tokens that the sequence may have."""
        self.rule, self.first_kv_head = rule, first_kv_head
        self._most = longest // rule.region_size
        self.num_regions = 0
        self._pending: list[Tensor] = []  # [1, G, S, D] keys of the region that is not complete, token after token
        self._num_pending = 0  # tokens of it
        self._largest_norm = 0.0  # of a descriptor
        self._found_GRE: Tensor | None = None  # fp32, a region's n descriptors side by side: here E = n D
        self._router: BlockRouter | None = None  # of the blocks of the region `_routed`
        self._routed = -1

    def add(self, k: Tensor) -> None:
        """Add the keys [1, G, S, D] of the next tokens, smeared, before or after RoPE as configured."""
        self._pending.append(k)
        self._num_pending += k.shape[2]
        size = self.rule.region_size
        if self._num_pending < size:
            return
        k = torch.cat(self._pending, 2)
        complete = self._num_pending // size * size
        self._store(k[:, :, :complete])
        self._num_pending -= complete
        # A copy, or all the keys of a prompt would stay in memory.
        self._pending = [k[:, :, complete:].clone()] if self._num_pending else []

    def choose(self, q: Tensor, token: int) -> Tensor:
        """Choose the route of the query block that begins at `token`; q [1, G, r, D] are its first token's queries.

        Returns:
            The regions of training's route of that block, int64 [1, G, 1, K], the own one last, then -1 = empty. The
            next call may write over it.
        """
        rule, own = self.rule, token // self.rule.region_size
        if rule.router == "affinity" and q.device.type not in KERNEL_DEVICES:
            if self._router is None or self._routed != own:
                self._router, self._routed = BlockRouter(self._keys(own, q), rule, self._largest_norm), own
            return self._router.choose(*query_of_block(q))
        keys_GED, place = self._keys(own, q), {"first_kv_head": self.first_kv_head}
        if q.device.type in KERNEL_DEVICES:  # the router of the GPU chooses, as in training
            block = q.flatten(1, 2)[:, :, None].expand(-1, -1, rule.query_block_size, -1)
            return route_query_blocks(block, keys_GED[None], rule, first_token=token, **place)
        keys_nGRD = keys_GED.unflatten(1, (-1, rule.descriptors_per_region)).permute(2, 0, 1, 3)
        number = token // rule.query_block_size
        query_1GD = exact_mean(q, (2,))
        return choose_regions(query_1GD[:, :, None], keys_nGRD[:, None], rule, first_block=number, **place)

    def _keys(self, own: int, like: Tensor) -> Tensor:
        """Return the descriptors [G, R * n, D] of the regions up to the one that the block lies in."""
        # The own region is no candidate: its descriptors, which are not complete, may be anything.
        self._reserve(own + 1, like)
        assert self._found_GRE is not None
        return self._found_GRE[:, : own + 1].view(like.shape[1], -1, like.shape[3])

    def size_bytes(self) -> int:
        """Return the bytes that the descriptors take so far, without what is kept free."""
        stored = self._found_GRE
        return 0 if stored is None else stored[:, : self.num_regions].numel() * stored.element_size()

    def _store(self, k: Tensor) -> None:
        """Keep the descriptors of the keys [1, G, S, D] of whole regions."""
        count = self.rule.descriptors_per_region
        found_GED = key_descriptors(k, self.rule.region_size, count)[0]
        first, self.num_regions = self.num_regions, self.num_regions + found_GED.shape[1] // count
        self._largest_norm = max(self._largest_norm, float(found_GED.norm(dim=2).max()))
        self._reserve(self.num_regions, k)
        assert self._found_GRE is not None
        self._found_GRE[:, first : self.num_regions] = found_GED.unflatten(1, (-1, count)).flatten(2)

    def _reserve(self, regions: int, like: Tensor) -> None:
        """Make room for the descriptors of so many regions; `like` [1, G, any, D] is on their device."""
        if self._found_GRE is None:
            shape = (like.shape[1], 0, self.rule.descriptors_per_region * like.shape[3])
            self._found_GRE = like.new_empty(shape, dtype=torch.float32)
        if regions > self._found_GRE.shape[1]:
            self._found_GRE = grown(self._found_GRE, regions, 1, self._most)


def grown(stored_GSE: Tensor, needed: int, step: int, most: int) -> Tensor:
    """Return a copy of storage that is full, with room for `needed` tokens or twice the size, filled with zeros.

    Args:
        stored_GSE: [G, S, E] what is stored now.
        needed: S that it must have.
        step: S is a multiple of it.
        most: S that is never passed.
    """
    have = stored_GSE.shape[1]
    wanted = min(most, max(needed, 2 * have))
    bigger_GSE = stored_GSE.new_zeros((stored_GSE.shape[0], -(-wanted // step) * step, stored_GSE.shape[2]))
    bigger_GSE[:, :have] = stored_GSE
    return bigger_GSE
