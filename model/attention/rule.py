"""The rule by which the regions of a query block are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Router = Literal["affinity", "random"]
# The fused router holds a row of affinities in registers.
MOST_REGIONS_OF_KERNEL = 16384


@dataclass(frozen=True)
class RouteRule:
    """How regions are chosen.

    Attributes:
        region_size: L.
        query_block_size: Lq.
        topk: K, the slots of a route.
        causal: whether a block may choose only its own region and earlier ones.
        force_own: whether the region that contains the block is always chosen.
        force_previous: whether the region before that one is always chosen.
        attention_sink: whether region 0 is always chosen.
        router: what ranks the other regions: "affinity", or "random" scores as a baseline.
        seed: of the random router.
        descriptors_per_region: n.

    Raises:
        ValueError: sizes do not fit together.
    """

    region_size: int
    query_block_size: int
    topk: int
    causal: bool
    force_own: bool = True
    force_previous: bool = True
    attention_sink: bool = False
    router: Router = "affinity"
    seed: int = 0
    descriptors_per_region: int = 1

    def __post_init__(self) -> None:
        for name, size in (
            ("query_block_size", self.query_block_size),
            ("descriptors_per_region", self.descriptors_per_region),
        ):
            if self.region_size % size:
                raise ValueError(f"{name}={size} does not divide region_size={self.region_size}")
        if self.causal and not self.force_own:
            raise ValueError("force_own=False needs causal=False: a causal token must see itself")
        forced = self.force_own + self.force_previous + self.attention_sink
        if self.topk < max(1, forced):
            raise ValueError(f"topk={self.topk} leaves no room for {forced} forced regions")
        if self.router not in ("affinity", "random"):
            raise ValueError(f"router={self.router!r} is unknown; use 'affinity' or 'random'")
