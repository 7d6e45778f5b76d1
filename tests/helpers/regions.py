"""Sizes of the tests of sharded regions; in a module of its own, so that ranks can unpickle it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from biroute.model.attention.rule import RouteRule


@dataclass(frozen=True)
class Case:
    """Sizes of one comparison."""

    ranks: int
    region_size: int = 4
    num_regions: int = 24
    query_block_size: int = 1
    topk: int = 5
    heads: int = 4
    groups: int = 2
    causal: bool = True
    kind: str = "bi_level"
    way: str = "auto"
    descriptors_per_region: int = 1
    skew: float = 0.0  # how strongly all queries want region 0
    distinct: int = 0  # regions that differ, the others repeat them: exact ties; 0: all
    dtype: torch.dtype = torch.float32

    @property
    def tokens(self) -> int:
        return self.num_regions * self.region_size

    @property
    def rule(self) -> RouteRule:
        return RouteRule(
            self.region_size,
            self.query_block_size,
            self.topk,
            self.causal,
            descriptors_per_region=self.descriptors_per_region,
        )
