"""What the routes of a layer say in numbers: distances, entropy, hot regions, regions that nobody chose.

Shapes: G key/value heads, N query blocks, K slots of a route, M routes, R regions of the text.

A *free choice* is a region of a route that no rule forced in (own, previous, first, as configured), of a block with
more regions up to its own than its route holds: everything else is no decision of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from biroute.model.attention.rule import RouteRule

HOTTEST = 5


@dataclass(frozen=True)
class Measures:
    """Numbers about routes; the fields are those of `--json`.

    Attributes:
        own, previous, first, other: shares of the entries of all routes, which add up to 1. `first` is region 0 where
            it is neither the own nor the previous region.
        mean_distance: regions from a block's own region back to those that it reads, mean over all entries.
        distances: entries of each distance 0 ... R - 1.
        in_degree: query blocks that read each region, [R].
        chosen: free choices of each region, [R].
        entropy_bits: Shannon entropy of the free choices over the regions; None where nothing was free.
        uniform_entropy_bits: what `entropy_bits` would be on average if every block chose among its candidates with
            equal probability. It is less than log2(R), as late regions have few blocks behind them.
        hottest: the regions with most free choices, most first.
        never_chosen: regions that were free to choose for some block and that none chose.
    """

    own: float
    previous: float
    first: float
    other: float
    mean_distance: float
    distances: list[int]
    in_degree: list[int]
    chosen: list[int]
    entropy_bits: float | None
    uniform_entropy_bits: float | None
    hottest: list[int]
    never_chosen: list[int]


def measure(route_GNK: Tensor, query_block_size: int, region_size: int, rule: RouteRule | None) -> list[Measures]:
    """Measure the routes of a layer.

    Args:
        route_GNK: int64, causal, ascending, -1 = empty.
        query_block_size: tokens of a query block.
        region_size: tokens of a region.
        rule: how regions were chosen; None if none was, as in a sliding window.

    Returns:
        The measures of the whole layer, then those of each key/value head.
    """
    own_N = torch.arange(route_GNK.shape[1]) * query_block_size // region_size
    num_regions = int(own_N[-1]) + 1
    together = _measure(route_GNK.flatten(0, 1), own_N.repeat(route_GNK.shape[0]), num_regions, rule)
    return [together, *(_measure(route_NK, own_N, num_regions, rule) for route_NK in route_GNK)]


def _measure(route_MK: Tensor, own_M: Tensor, num_regions: int, rule: RouteRule | None) -> Measures:
    real_MK = route_MK >= 0
    distance_MK = own_M[:, None] - route_MK
    counts = torch.bincount(distance_MK[real_MK], minlength=num_regions)
    entries = int(counts.sum())
    own, previous = int(counts[0]), int(counts[1]) if num_regions > 1 else 0
    first = int(((route_MK == 0) & (distance_MK > 1)).sum())
    free_MK = _free(route_MK, distance_MK, own_M, rule) & real_MK
    chosen_R = torch.bincount(route_MK[free_MK], minlength=num_regions)
    expected_R = _uniform_choices(free_MK, own_M, num_regions, rule)
    order = torch.sort(chosen_R, descending=True, stable=True).indices[:HOTTEST].tolist()
    return Measures(
        own=own / entries,
        previous=previous / entries,
        first=first / entries,
        other=(entries - own - previous - first) / entries,
        mean_distance=float((counts * torch.arange(num_regions)).sum()) / entries,
        distances=counts.tolist(),
        in_degree=torch.bincount(route_MK[real_MK], minlength=num_regions).tolist(),
        chosen=chosen_R.tolist(),
        entropy_bits=_entropy_bits(chosen_R.double()),
        uniform_entropy_bits=_entropy_bits(expected_R),
        hottest=[region for region in order if chosen_R[region]],
        never_chosen=((expected_R > 0) & (chosen_R == 0)).nonzero()[:, 0].tolist(),
    )


def _free(route_MK: Tensor, distance_MK: Tensor, own_M: Tensor, rule: RouteRule | None) -> Tensor:
    """Return which entries, bool [M, K], were the model's decision."""
    if rule is None:
        return torch.zeros_like(route_MK, dtype=torch.bool)
    free_MK = (own_M[:, None] + 1 > rule.topk).expand_as(route_MK).clone()
    for forced, forced_MK in _forced(route_MK, distance_MK, rule):
        if forced:
            free_MK &= ~forced_MK
    return free_MK


def _forced(region: Tensor, distance: Tensor, rule: RouteRule) -> Sequence[tuple[bool, Tensor]]:
    return (
        (rule.force_own, distance == 0),
        (rule.force_previous, distance == 1),
        (rule.attention_sink, region == 0),
    )


def _uniform_choices(free_MK: Tensor, own_M: Tensor, num_regions: int, rule: RouteRule | None) -> Tensor:
    """Return how often each region, fp64 [R], would be a free choice on average if all candidates were equal."""
    expected_R = torch.zeros(num_regions, dtype=torch.float64)
    if rule is None:
        return expected_R
    choices_R = torch.zeros(num_regions, dtype=torch.float64).index_add(0, own_M, free_MK.sum(1).double())
    for own in choices_R.nonzero()[:, 0].tolist():
        region = torch.arange(own + 1)
        candidate = torch.ones(own + 1, dtype=torch.bool)
        for forced, which in _forced(region, own - region, rule):
            if forced:
                candidate &= ~which
        expected_R[: own + 1] += candidate * choices_R[own] / candidate.sum()
    return expected_R


def _entropy_bits(counts_R: Tensor) -> float | None:
    if counts_R.sum() == 0:
        return None
    share = counts_R[counts_R > 0] / counts_R.sum()
    return float(-(share * share.log2()).sum()) + 0.0  # + 0: no -0.0
