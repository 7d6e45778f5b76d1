"""Attention over all that was fetched in one call of the GPU kernels: each head's regions in a table of its own.

A call for each owner and head, as on the CPU, would start hundreds of kernels, gather each query once for each owner
and merge as many outputs. On the CPU that is cheap, and its bits do not depend on which way regions are reached.

Shapes: B sequences, H query heads, G key/value heads, g one of B * G, S tokens of this rank, N query blocks, K slots
of a route, L tokens of a region, D head size, W fetched regions of all heads, T regions of a head's table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from biroute.model.attention.grid import RegionGrid
from biroute.model.attention.partial import (
    merge_weights,
    partial_attention,
    partial_attention_backward,
    working_dtype,
)
from biroute.parallel.region.costs import RegionLayout
from biroute.parallel.region.transfers import Transfers


@dataclass(frozen=True)
class FetchedTable:
    """Where each fetched region is in the table of its head, and the route through the tables."""

    route: Tensor  # int32 [B, G, N, K] places in the table, -1 = not fetched, in any slot: the kernels mind no order
    group: Tensor  # int64 [W] head of each fetched region
    place: Tensor  # int64 [W] its place in the table
    size: int  # T, that of the largest table

    @staticmethod
    def of(route: Tensor, layout: RegionLayout, requests: Transfers) -> FetchedTable | None:
        """Arrange what this rank fetches; None if that is nothing.

        Args:
            route: int64 [B, G, N, K], regions of the whole sequence that this rank's query blocks chose.
            layout: which rank has which regions.
            requests: what this rank requests.
        """
        size = max(requests.fetched_of_groups())
        if size == 0:
            return None
        group, region = requests.fetched_places(layout.regions_per_rank)
        place_gR = route.new_zeros(requests.num_groups * layout.num_regions)
        at = group * layout.num_regions + region
        place_gR.scatter_(0, at, torch.ones_like(at))
        fetched_gR = place_gR.view(requests.num_groups, -1) > 0
        place_gR = place_gR.view(requests.num_groups, -1).cumsum(1) - 1
        place_gR = place_gR.where(fetched_gR, -1)
        chosen = route.flatten(0, 1).flatten(1)
        table = place_gR.gather(1, chosen.clamp(min=0)).where(chosen >= 0, -1)
        return FetchedTable(table.int().view_as(route), group, place_gR.flatten()[at], size)

    def keys(self, fetched: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Arrange keys and values by head: [W, 2, L, D] -> [B, G, T * L, D] each; no route names the rest of it."""
        groups = self.route.shape[0] * self.route.shape[1]
        row = self.group.new_zeros(groups * self.size)
        row.scatter_(0, self.group * self.size + self.place, torch.arange(len(fetched), device=fetched.device))
        k, v = (fetched[:, one][row].view(batch, groups // batch, -1, fetched.shape[3]) for one in (0, 1))
        return k, v

    def attend(self, out: Tensor, lse: Tensor, q: Tensor, fetched: Tensor, grid: RegionGrid) -> None:
        """Merge attention over the tables into out [B, H, S, D] and lse [B, H, S]."""
        k, v = self.keys(fetched, len(q))
        part, part_lse = partial_attention(q, k, v, self.route, grid, out_dtype=out.dtype)
        weight, part_weight, merged_lse = merge_weights(lse, part_lse)
        lse.copy_(merged_lse)
        out *= weight[..., None]
        out.addcmul_(part, part_weight[..., None])

    def backward(
        self, q: Tensor, fetched: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, grid: RegionGrid
    ) -> tuple[Tensor, Tensor]:
        """Compute the part of what was fetched in dq [B, H, S, D], and its gradients [W, 2, L, D]."""
        k, v = self.keys(fetched, len(q))
        dq, dk, dv = partial_attention_backward(
            q, k, v, self.route, grid, dout=dout, lse=lse, delta=delta, out_dtype=working_dtype(q)
        )
        at = self.group * self.size + self.place
        d_fetched = [x.unflatten(2, (self.size, -1)).flatten(0, 2)[at] for x in (dk, dv)]
        return dq, torch.stack(d_fetched, 1)
