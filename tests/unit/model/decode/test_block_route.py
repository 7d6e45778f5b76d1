"""The route of one block, against training's choice: where regions are few or many, apart or nearly equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from biroute.model.attention.routing import choose_regions, query_descriptors
from biroute.model.attention.rule import RouteRule
from biroute.model.decode import block_route
from biroute.model.decode.block_route import query_of_block, route_of_block

RULES: dict[str, dict[str, Any]] = {
    "own and previous": {},
    "own alone": {"force_previous": False},
    "with a sink": {"attention_sink": True},
    "all slots forced": {"attention_sink": True, "topk": 3},
}


def both_routes(query_GD: Tensor, keys_nGRD: Tensor, rule: RouteRule) -> tuple[Tensor, Tensor]:
    """What decoding chooses, and what training does."""
    own = keys_nGRD.shape[2] - 1
    longest = float(keys_nGRD[:, :, :-1].norm(dim=3).max()) if own else 0.0
    expected = choose_regions(query_GD[None, :, None], keys_nGRD[:, None].double(), rule, first_block=own)
    return route_of_block(query_GD, keys_nGRD.permute(1, 2, 0, 3).flatten(1, 2), rule, longest), expected


def rule_of(kind: str, descriptors: int) -> RouteRule:
    sizes = {"region_size": 8, "query_block_size": 8, "topk": 6, "descriptors_per_region": descriptors}
    return RouteRule(**{**sizes, "causal": True, **RULES[kind]})


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("descriptors", [1, 4])
def test_it_is_trainings_choice(kind: str, descriptors: int) -> None:
    rule = rule_of(kind, descriptors)
    for seed, regions in enumerate((1, 2, 5, 6, 7, 8, 20, 127, 128, 129, 700)):
        torch.manual_seed(seed)
        query, keys = torch.randn(2, 16), torch.randn(descriptors, 2, regions, 16)
        keys[:, :, -1] = 1e6  # of the own region, which is not complete
        found, expected = both_routes(query, keys, rule)
        assert torch.equal(found, expected), regions


@pytest.mark.parametrize("distinct", [1, 3, 150])
def test_of_equal_regions_the_lower_one_wins(distinct: int) -> None:
    torch.manual_seed(0)
    few = torch.randn(2, 3, distinct, 16)
    keys = few.repeat(1, 1, -(-600 // distinct), 1)[:, :, :600]
    found, expected = both_routes(torch.randn(3, 16), keys, rule_of("own alone", 2))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("scale", [1.0, 1e15, 1e-20])
def test_regions_that_fp32_cannot_tell_apart(scale: float) -> None:
    """Their affinities differ only behind the digits that products in fp32 get right; the scan must not decide."""
    torch.manual_seed(1)
    base = torch.randn(64)
    keys = (base + 1e-6 * torch.randn(1, 2, 400, 64)) * scale
    query = (torch.randn(2, 64) + base) * scale
    rule = rule_of("own alone", 1)
    found, expected = both_routes(query, keys, rule)
    assert torch.equal(found, expected)
    rough = (query[:, None] @ keys.transpose(2, 3))[0, :, 0]
    rough[:, -1] = torch.inf
    if scale == 1.0:
        by_fp32 = rough.topk(rule.topk).indices.sort(1).values
        assert not torch.equal(by_fp32[None, :, None], expected), "or this test would be about nothing"


def test_only_what_fp32_cannot_tell_apart_is_compared_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    among = block_route._route_among
    monkeypatch.setattr(
        block_route, "_route_among", lambda near_M, *given: asked.append(len(near_M)) or among(near_M, *given)
    )
    keys = torch.arange(300.0)[:, None].expand(1, 2, 300, 16).clone()
    for equal in (0, 9):
        keys[:, :, 290 : 290 + equal] = 295.0
        found, expected = both_routes(torch.ones(2, 16), keys, rule_of("own alone", 1))
        assert torch.equal(found, expected)
    assert asked == [10]  # of the second keys: the equal ones and the own region


@pytest.mark.parametrize("worst", [0.0, 1e14, 1e16, torch.inf, torch.nan])
def test_the_query_of_a_block_is_trainings_descriptor(worst: float) -> None:
    """Of a diverged model as well, where descriptors are clamped; how far fp32 may be off is finite then, too."""
    torch.manual_seed(2)
    q = torch.randn(1, 2, 3, 16)
    q[0, 1, 2, 5] = worst or q[0, 1, 2, 5]
    query, longest = query_of_block(q)
    expected = query_descriptors(q.flatten(1, 2)[:, :, None], 2, 1, True)[0, :, 0]
    assert torch.equal(query, expected)
    assert longest == pytest.approx(float(expected.double().norm()), rel=1e-6)
