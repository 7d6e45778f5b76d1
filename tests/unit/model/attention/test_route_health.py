"""Health of a route, against loops over sets."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from biroute.model.attention.route_health import count_route, distance_names, health_of, uniform_in_degree
from biroute.model.attention.routing import route_regions
from biroute.model.attention.rule import RouteRule

LENGTH, REGIONS = 48, 12
RULES = {
    "causal": RouteRule(4, 1, 4, causal=True),
    "causal, sink, blocks of 2": RouteRule(4, 2, 5, causal=True, attention_sink=True),
    "causal, previous not forced": RouteRule(4, 4, 3, causal=True, force_previous=False),
    "bidirectional": RouteRule(4, 2, 4, causal=False),
    "bidirectional, own not forced, sink": RouteRule(4, 1, 3, causal=False, force_own=False, attention_sink=True),
}


def forced_regions(rule: RouteRule, own: int) -> set[int]:
    wanted = {own} if rule.force_own else set()
    wanted |= {own - 1} if rule.force_previous and own else set()
    return wanted | ({0} if rule.attention_sink else set())


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def slow_head(route: list[set[int]], before: list[set[int]], rule: RouteRule) -> dict[str, float]:
    """The health of one head, from the definitions."""
    per_region = rule.region_size // rule.query_block_size
    own = [block // per_region for block in range(len(route))]
    free = [chosen - forced_regions(rule, o) for chosen, o in zip(route, own, strict=True)]
    away = [abs(o - region) for chosen, o in zip(free, own, strict=True) for region in chosen]
    slots = [(o, region) for chosen, o in zip(route, own, strict=True) for region in chosen]
    found = {
        "own": mean([o == region for o, region in slots]),
        "previous": mean([o - region == 1 for o, region in slots]),
        "first": mean([region == 0 and o > 1 for o, region in slots]),
        "mean_distance": mean(away),
        "block_overlap": mean([r in route[n - 1] for n in range(1, len(route)) for r in free[n]]),
        "layer_overlap": mean([r in before[n] for n in range(len(route)) for r in free[n]]),
    }
    for name in distance_names(REGIONS):
        low, high = int(name.split("_")[1]), int(name.split("_")[-1])
        if not (low == 0 and rule.force_own) and not (low == 1 and rule.force_previous and rule.causal):
            found[name] = mean([low <= distance <= high for distance in away])
    expected = Counter[int]()
    for o in own:
        candidates = set(range(o + 1 if rule.causal else REGIONS)) - forced_regions(rule, o)
        for region in candidates:
            expected[region] += min(rule.topk - len(forced_regions(rule, o)), len(candidates)) / len(candidates)
    assert uniform_in_degree(rule, REGIONS) == pytest.approx([expected[region] for region in range(REGIONS)])
    counts = Counter(region for chosen in free for region in chosen)
    total = sum(counts.values())
    found["entropy"] = -sum(c / total * math.log(c / total) for c in counts.values()) / math.log(len(expected))
    found["never_chosen"] = mean([counts[region] == 0 for region in expected])
    region, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
    found["hottest"] = count / expected[region]
    return found


def sets_of(route_GNK: Tensor) -> list[list[set[int]]]:
    return [[{r for r in block if r >= 0} for block in head] for head in route_GNK.tolist()]


@pytest.mark.parametrize("name", RULES)
def test_health_is_what_loops_over_sets_find(name: str) -> None:
    rule = RULES[name]
    q, k = torch.randn(2, 1, 4, LENGTH, 8), torch.randn(2, 1, 2, LENGTH, 8)
    k[:, :, :, 8:12] *= 4  # a region that many choose
    route, before = (route_regions(q[n], k[n], rule)[0] for n in range(2))
    found = health_of(count_route(route, rule, REGIONS, before_GNK=before).tolist(), rule, REGIONS)
    heads = [slow_head(*head, rule) for head in zip(sets_of(route), sets_of(before), strict=True)]
    want = {key: mean([head[key] for head in heads]) for key in heads[0]}
    want["hottest"] = max(head["hottest"] for head in heads)
    assert {key: found[key] for key in want} == pytest.approx(want, abs=1e-12)
    assert all(value == 0 for key, value in found.items() if key not in want)


def test_counts_of_parts_of_a_sequence_add_up() -> None:
    """But for the first block of a part, which does not know the one before it."""
    rule = RULES["causal"]
    route = route_regions(torch.randn(1, 4, LENGTH, 8), torch.randn(1, 2, LENGTH, 8), rule)[0]
    whole = count_route(route, rule, REGIONS)
    parts = [count_route(part, rule, REGIONS, first_block=24 * n) for n, part in enumerate(route.split(24, 1))]
    same = [n for n in range(whole.shape[1]) if n not in (6, 7)]
    assert torch.equal(sum(parts)[:, same], whole[:, same])
    assert torch.all(sum(parts)[:, 6] < whole[:, 6])


def test_a_route_without_free_slots_has_only_shares() -> None:
    rule = RouteRule(4, 4, 2, causal=True)
    route = torch.tensor([[[0, -1], [0, 1], [1, 2], [2, 3]]])
    found = health_of(count_route(route, rule, 4).tolist(), rule, 4)
    assert found == {"own": 4 / 7, "previous": 3 / 7, "first": 0.0}
