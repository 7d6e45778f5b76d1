"""What the exchange between region ranks costs, from sizes alone. No torch: `biroute plan` computes with it.

Shapes: B sequences, G key/value heads, P ranks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RegionLayout:
    """The regions of a sequence on `num_ranks` ranks: each has a contiguous run of equal length.

    Raises:
        ValueError: the ranks do not divide the regions.
    """

    num_regions: int
    region_size: int  # tokens
    num_ranks: int

    def __post_init__(self) -> None:
        if self.num_regions % self.num_ranks:
            raise ValueError(f"{self.num_ranks} ranks do not divide the {self.num_regions} regions")

    @property
    def regions_per_rank(self) -> int:
        return self.num_regions // self.num_ranks

    @property
    def tokens_per_rank(self) -> int:
        return self.regions_per_rank * self.region_size

    def first_token(self, rank: int) -> int:
        return rank * self.tokens_per_rank

    def others(self, rank: int, causal: bool) -> int:
        """Return how many ranks' regions this one may choose: all others, or in a causal model the earlier ones."""
        return rank if causal else self.num_ranks - 1


@dataclass(frozen=True)
class ExchangeCosts:
    """Bytes that forward moves. Backward moves the gradients of the same rows, so the cheaper way is the same."""

    region: int  # keys and values of a region of one key/value head
    queries: int  # one query block of one key/value head, on its way to the owner
    results: int  # its partial output and log-sum-exps, on the way back

    @classmethod
    def of(
        cls, *, region_size: int, query_block_size: int, heads_per_group: int, head_size: int, element_size: int
    ) -> ExchangeCosts:
        """Compute the costs for elements of `element_size` bytes; log-sum-exps travel in fp32."""
        rows = heads_per_group * query_block_size
        row = head_size * element_size
        return cls(region=2 * region_size * row, queries=rows * row, results=rows * (row + 4))


@dataclass(frozen=True)
class Baselines:
    """Bytes that a rank would receive in forward of one layer by other means."""

    causal_fetch: int  # keys and values of all tokens that its queries may see
    ring: int  # keys and values of all other ranks, as a ring or an all-gather moves them
    bound: int  # no route of this form can make the chosen plan move more

    @classmethod
    def of(
        cls,
        layout: RegionLayout,
        rank: int,
        costs: ExchangeCosts,
        *,
        groups: int,
        blocks: int,
        topk: int,
        causal: bool,
    ) -> Baselines:
        """Compute the baselines of one rank.

        Args:
            layout: which rank has which regions.
            rank: the rank.
            costs: bytes of a region, of queries and of results.
            groups: B * G.
            blocks: query blocks of a rank.
            topk: regions of a route. In a causal model at least one of them, the own region, is on this rank.
            causal: whether a query may choose earlier regions only.
        """
        visible = layout.others(rank, causal)
        per_rank = groups * layout.regions_per_rank * costs.region
        elsewhere = topk - 1 if causal else topk
        ship = groups * blocks * min(elsewhere, visible) * (costs.queries + costs.results)
        return cls(
            causal_fetch=visible * per_rank,
            ring=(layout.num_ranks - 1) * per_rank,
            bound=min(visible * per_rank, ship),
        )
