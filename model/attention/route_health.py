"""How healthy the routes of a layer are: where their slots go, and whether they use the whole sequence.

Counts are sums over query blocks, so those of ranks that share a sequence add up. Nothing here waits for the device.

Shapes: G key/value heads, N query blocks, K slots of a route, R regions, J counted quantities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from biroute.model.attention.rule import RouteRule

# What is counted of each head; distances in powers of two and the in-degree of each region follow.
_COUNTS = (
    "slots", "own", "previous", "first", "free", "distance",
    "after_block", "with_block_before", "after_layer", "with_layer_before",
)  # fmt: skip


def distance_names(num_regions: int) -> list[str]:
    """Name the bins of distances: `distance_0`, then by powers of two, `distance_2_3` and so on."""
    starts = [1 << power for power in range((num_regions - 1).bit_length())]
    return ["distance_0", *("distance_1" if low == 1 else f"distance_{low}_{2 * low - 1}" for low in starts)]


def num_counts(num_regions: int) -> int:
    """Return J, the quantities that `count_route` counts."""
    return len(_COUNTS) + len(distance_names(num_regions)) + num_regions


@torch.no_grad()
def count_route(
    route_GNK: Tensor, rule: RouteRule, num_regions: int, *, first_block: int = 0, before_GNK: Tensor | None = None
) -> Tensor:
    """Count the route of one sequence.

    A slot is *free* if the rule does not force its region. A free region counts as shared with the block or the layer
    before if that one's route holds it, forced or not.

    Args:
        route_GNK: int64 [G, N, K] consecutive query blocks, ascending, -1 = empty.
        rule: by which it was chosen.
        num_regions: R, of the whole sequence.
        first_block: the number of the first query block in the sequence.
        before_GNK: the route of the layer before, for the same blocks; None if there is none.

    Returns:
        fp64 [G, J], sums over the blocks.
    """
    blocks = route_GNK.shape[1]
    block_N1 = torch.arange(first_block, first_block + blocks, device=route_GNK.device)[:, None]
    away = block_N1 * rule.query_block_size // rule.region_size - route_GNK
    distance, taken = away.abs(), route_GNK >= 0
    own, previous = taken & (away == 0), taken & (away == 1)
    free = taken
    if rule.force_own:
        free = free & ~own
    if rule.force_previous:
        free = free & ~previous
    if rule.attention_sink:
        free = free & (route_GNK != 0)
    # Empty slots go to the end, so that rows ascend.
    ascending = torch.where(taken, route_GNK, num_regions)
    with_block = _shared(ascending[:, 1:], ascending[:, :-1]) & free[:, 1:]
    if before_GNK is None:
        with_layer = after_layer = torch.zeros_like(free[:, :0])
    else:
        with_layer = _shared(ascending, torch.where(before_GNK >= 0, before_GNK, num_regions)) & free
        after_layer = free
    sums = (
        taken, own, previous, taken & (route_GNK == 0) & (distance > 1), free, distance * free,
        free[:, 1:], with_block, after_layer, with_layer,
    )  # fmt: skip
    totals = torch.stack([x.sum((1, 2), dtype=torch.float64) for x in sums], 1)
    names = distance_names(num_regions)
    powers = torch.tensor([1 << power for power in range(len(names) - 1)], device=route_GNK.device)
    return torch.cat(
        [
            totals,
            _histogram(torch.bucketize(distance, powers, right=True).clamp_(max=len(names) - 1), free, len(names)),
            _histogram(route_GNK.clamp(min=0), free, num_regions),
        ],
        1,
    )


def _shared(rows: Tensor, others: Tensor) -> Tensor:
    """Return which elements of ascending rows [..., K] the other rows hold; [..., K] bool."""
    place = torch.searchsorted(others.contiguous(), rows.contiguous()).clamp_(max=others.shape[-1] - 1)
    return others.gather(-1, place) == rows


def _histogram(bins_GNK: Tensor, counted_GNK: Tensor, num_bins: int) -> Tensor:
    counts = torch.zeros(bins_GNK.shape[0], num_bins, dtype=torch.float64, device=bins_GNK.device)
    return counts.scatter_add_(1, bins_GNK.flatten(1), counted_GNK.flatten(1).double())


def uniform_in_degree(rule: RouteRule, num_regions: int) -> list[float]:
    """Return how many free slots of a sequence each region would get if every block chose uniformly.

    Uniformly among the regions that it may choose and is not given anyway: in a causal model early regions get more
    than late ones.

    Returns:
        R numbers; 0 for regions that no block may choose freely.
    """
    blocks = rule.region_size // rule.query_block_size
    rates = []  # of each own region: free slots for each candidate
    for own in range(num_regions):
        forced = set[int]()
        if rule.force_own:
            forced.add(own)
        if rule.force_previous and own > 0:
            forced.add(own - 1)
        if rule.attention_sink:
            forced.add(0)
        # A causal route forces the own region, so the candidates are the earlier ones without those forced.
        candidates = (own + 1 if rule.causal else num_regions) - len(forced)
        rates.append(blocks * min(rule.topk - len(forced), candidates) / candidates if candidates else 0.0)
    if rule.causal:
        gap = 2 if rule.force_previous else 1
        later = [0.0] * (num_regions + gap)
        for own in reversed(range(num_regions)):
            later[own] = later[own + 1] + rates[own]
        expected = [later[region + gap] for region in range(num_regions)]
    else:
        expected = [sum(rates)] * num_regions
        for region in range(num_regions):
            expected[region] -= rates[region] if rule.force_own else 0.0
            expected[region] -= rates[region + 1] if rule.force_previous and region + 1 < num_regions else 0.0
    if rule.attention_sink:
        expected[0] = 0.0
    return [value if value > 1e-9 * num_regions else 0.0 for value in expected]


def health_of(counts: Sequence[Sequence[float]], rule: RouteRule, num_regions: int) -> dict[str, float]:
    """Return the health of a layer from the counts [G][J] of one sequence; a quantity without meaning is left out.

    All but the last are means over heads:

    - `own`, `previous`, `first`: share of the filled slots that go to the own region, the one before it, and region 0
      where it is neither;
    - `mean_distance` of the free slots, in regions; `distance_2_3` and so on: the share of them at those distances;
    - `block_overlap`, `layer_overlap`: share of the free slots whose region the query block before, and the layer
      before, hold as well;
    - `entropy` of the regions in free slots, over that of all regions that could be chosen, equally often;
    - `never_chosen`: share of those regions that no free slot holds;
    - `hottest`: slots of the region that most chose, over those it would get if blocks chose uniformly; of the head
      where this is largest.
    """
    expected = uniform_in_degree(rule, num_regions)
    names = distance_names(num_regions)
    heads = []
    for row in counts:
        head = dict(zip(_COUNTS, row, strict=False))
        found = {name: _ratio(head[name], head["slots"]) for name in ("own", "previous", "first")}
        found["mean_distance"] = _ratio(head["distance"], head["free"])
        found["block_overlap"] = _ratio(head["with_block_before"], head["after_block"])
        found["layer_overlap"] = _ratio(head["with_layer_before"], head["after_layer"])
        bins = row[len(_COUNTS) : len(_COUNTS) + len(names)]
        possible = (not rule.force_own, not (rule.force_previous and rule.causal), *[True] * len(names))
        for name, count, shown in zip(names, bins, possible, strict=False):
            found |= {name: _ratio(count, head["free"])} if shown else {}
        heads.append(found | _spread(row[-num_regions:], expected))
    means = {name: math.fsum(head[name] for head in heads) / len(heads) for name in heads[0]}
    means["hottest"] = max(head["hottest"] for head in heads)
    return {name: value for name, value in means.items() if math.isfinite(value)}


def _spread(in_degree: Sequence[float], expected: Sequence[float]) -> dict[str, float]:
    """Return how the free slots of a head spread over the regions that could get some."""
    possible = [region for region, value in enumerate(expected) if value > 0]
    total = math.fsum(in_degree)
    if not possible or not total:
        return dict.fromkeys(("entropy", "never_chosen", "hottest"), math.nan)
    shares = [in_degree[region] / total for region in possible if in_degree[region]]
    entropy = -math.fsum(share * math.log(share) for share in shares)
    hottest = max(possible, key=lambda region: in_degree[region])
    return {
        "entropy": entropy / math.log(len(possible)) if len(possible) > 1 else math.nan,
        "never_chosen": 1 - len(shares) / len(possible),
        "hottest": in_degree[hottest] / expected[hottest],
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
