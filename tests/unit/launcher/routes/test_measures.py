"""Measures of routes beside plain loops, and what is no choice of the model."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from biroute.launcher.routes.measures import measure
from biroute.model.attention.routing import sliding_window_route
from biroute.model.attention.rule import RouteRule


def rule(**changes: object) -> RouteRule:
    sizes: dict[str, object] = {"region_size": 4, "query_block_size": 2, "topk": 3, "causal": True} | changes
    return RouteRule(**sizes)  # type: ignore[arg-type]


def random_route(own: int, topk: int, forced: set[int], generator: torch.Generator) -> list[int]:
    """Own and previous region, and others by chance, as a causal block may choose them."""
    others = [region for region in torch.randperm(own + 1, generator=generator).tolist() if region not in forced]
    return sorted([*forced, *others][:topk])


@pytest.mark.parametrize("sink", [False, True])
def test_measures_are_those_of_plain_loops(sink: bool) -> None:
    heads, blocks, topk = 2, 19, 4
    generator = torch.Generator().manual_seed(3)
    own_of = [block * 2 // 4 for block in range(blocks)]
    routes = []
    for _ in range(heads):
        routes.append([
            random_route(own, topk, {own, max(0, own - 1)} | ({0} if sink else set()), generator) for own in own_of
        ])  # fmt: skip
    padded = torch.tensor([[one + [-1] * (topk - len(one)) for one in head] for head in routes])
    together, *each = measure(padded, 2, 4, rule(topk=topk, attention_sink=sink))
    assert len(each) == heads
    for found, some in ((together, routes), (each[1], routes[1:])):
        entries = [
            (own, region) for head in some for own, route in zip(own_of, head, strict=True) for region in route
        ]
        forced = [own == region or own - 1 == region or (sink and region == 0) for own, region in entries]
        free = Counter(
            region for (own, region), given in zip(entries, forced, strict=True) if not given and own + 1 > topk
        )
        total = len(entries)
        assert found.own == sum(own == region for own, region in entries) / total
        assert found.previous == sum(own - 1 == region for own, region in entries) / total
        assert found.first == sum(region == 0 and own > 1 for own, region in entries) / total
        assert found.own + found.previous + found.first + found.other == pytest.approx(1)
        assert found.mean_distance == pytest.approx(sum(own - region for own, region in entries) / total)
        assert found.distances == [sum(own - region == d for own, region in entries) for d in range(10)]
        assert found.in_degree == [sum(region == r for _, region in entries) for r in range(10)]
        assert found.chosen == [free[region] for region in range(10)]
        share = [count / free.total() for count in free.values()]
        assert found.entropy_bits == pytest.approx(-sum(p * math.log2(p) for p in share))
        assert found.hottest == sorted([r for r in range(10) if free[r]], key=lambda r: (-free[r], r))[:5]


def test_a_uniform_choice_has_the_uniform_entropy_and_a_constant_one_none() -> None:
    """Three blocks of region 3 that may choose region 0 or 1: all take 0, or they take turns."""
    blocks = [[0, -1, -1], [0, -1, -1], [0, 1, -1], [0, 1, -1], [0, 1, 2], [0, 1, 2]]
    same = torch.tensor([[*blocks, [0, 2, 3], [0, 2, 3]]])
    turns = torch.tensor([[*blocks, [0, 2, 3], [1, 2, 3]]])
    for route, entropy, never in ((same, 0.0, [1]), (turns, 1.0, [])):
        found, _ = measure(route, 2, 4, rule())
        assert (found.entropy_bits, found.uniform_entropy_bits, found.never_chosen) == (entropy, 1.0, never)
    assert measure(same, 2, 4, rule())[0].chosen == [2, 0, 0, 0], "early blocks read everything, and choose nothing"


def test_a_sliding_window_chooses_nothing() -> None:
    route = sliding_window_route(
        batch=1, kv_heads=1, num_tokens=32, region_size=4, query_block_size=4, topk=3, causal=True, first_token=0,
        sequence_length=32, device=torch.device("cpu"),
    )  # fmt: skip
    found, _ = measure(route[0], 4, 4, None)
    assert (found.entropy_bits, found.uniform_entropy_bits, found.hottest, found.never_chosen) == (None, None, [], [])
    assert found.distances == [8, 7, 6, 0, 0, 0, 0, 0]


def test_a_text_of_one_region() -> None:
    found, _ = measure(torch.tensor([[[0, -1]]]), 2, 4, rule(topk=2))
    assert (found.own, found.previous, found.mean_distance, found.entropy_bits) == (1.0, 0.0, 0.0, None)
