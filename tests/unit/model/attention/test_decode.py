"""Attention with a state: tokens handed over in any pieces see what they see in one forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from biroute.configs.load import config_from_tree
from biroute.configs.schema import ModelConfig
from biroute.model.attention.core import CoreAttention
from biroute.model.attention.decode import DecodeState

TOKENS = 48
KINDS: dict[str, dict[str, Any]] = {
    "a route a token": {},
    "blocks": {"attention": {"query_block_size": 4, "topk": 4}},
    "one route a region": {"attention": {"query_block_size": 8}},
    "several descriptors after RoPE": {"attention": {"descriptors_per_region": 4, "descriptor": "post_rope"}},
    "a sink, keys not smeared": {"attention": {"attention_sink": True}, "key_smear": False},
    "random": {"attention": {"router": "random"}},
    "sliding window": {"attention": {"kind": "sliding_window"}},
    "dense": {"attention": {"kind": "dense"}},
}


def model_config(changes: dict[str, Any]) -> ModelConfig:
    attention = {"region_size": 8, "topk": 3, "descriptors_per_region": 1} | changes.get("attention", {})
    sizes = {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "sequence_length": TOKENS}
    return config_from_tree({"model": sizes | changes | {"attention": attention}}, "test").model


def heads(count: int) -> Tensor:
    return torch.randn(2, count, TOKENS, 8)


@pytest.mark.parametrize("pieces", [[1] * TOKENS, [TOKENS], [21, *[1] * 10, 17], [8, 8, 3, 29]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_give_what_the_whole_gives(kind: str, pieces: list[int]) -> None:
    core = CoreAttention(model_config(KINDS[kind]), 1, num_kv_heads=2)
    q, k, v = heads(4), heads(2), heads(2)
    routes: list[Tensor] = []
    core.on_route = lambda _, route: routes.append(route)
    with torch.no_grad():
        whole = core(q, k, v)
        core.state = DecodeState()
        parts = [core(*xs) for xs in zip(*(x.split(pieces, 2) for x in (q, k, v)), strict=True)]
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-5, atol=1e-5)
    assert core.state.length == TOKENS
    if core.kind != "dense":
        assert torch.equal(torch.cat(routes[1:], 2), routes[0])


def test_a_bidirectional_model_has_no_state() -> None:
    core = CoreAttention(model_config({"objective": "mlm"}), 0, num_kv_heads=2)
    core.state = DecodeState()
    with pytest.raises(ValueError, match="a state needs a causal model"):
        core(heads(4), heads(2), heads(2))


def test_a_router_of_ones_own_decides_the_route() -> None:
    core = CoreAttention(model_config({}), 0, num_kv_heads=2)
    own = torch.arange(TOKENS)[:, None] // 8
    route = torch.cat((own, torch.full((TOKENS, 2), -1)), 1).expand(2, 2, TOKENS, 3)
    seen: list[tuple[int, Tensor]] = []
    core.router = lambda q, k: route
    core.on_route = lambda layer, chosen: seen.append((layer, chosen))
    q, k, v = heads(4), heads(2), heads(2)
    changed = v.clone()
    changed[:, :, :8] += 1.0
    with torch.no_grad():
        before, after = core(q, k, v), core(q, k, changed)
    assert torch.equal(before[:, :, 8:], after[:, :, 8:])  # each token sees its own region only
    assert not torch.equal(before[:, :, :8], after[:, :, :8])
    assert [layer for layer, _ in seen] == [0, 0] and seen[0][1] is route
