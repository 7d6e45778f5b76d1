"""The route of one block, against training's choice: where regions are few or many, apart or nearly equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from biroute.model.attention.routing import choose_regions
from biroute.model.attention.rule import RouteRule
from biroute.model.decode import block_route
from biroute.model.decode.block_route import route_of_block

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
    return route_of_block(query_GD, keys_nGRD, rule, longest), expected


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
def test_regions_that_fp32_cannot_tell_apart(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_many_regions_are_scanned_and_few_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    scan = block_route._route_by_scan
    monkeypatch.setattr(
        block_route, "_route_by_scan", lambda *given: asked.append((one := scan(*given)) is not None) or one
    )
    for regions in (100, 127, 300, 5000):
        both_routes(torch.randn(2, 16), torch.randn(4, 2, regions, 16), rule_of("own and previous", 4))
    assert asked == [True, True]
