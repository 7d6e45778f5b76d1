"""Every field of the configuration that concerns routing reaches the route of a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from biroute.configs.load import config_from_tree
from biroute.model.attention import core, grid, partial, reference, routing
from biroute.model.attention.bi_level import dense_attention
from biroute.model.attention.core import CoreAttention
from biroute.model.attention.rope import apply_rotary, rotary_tables, rotate_token, whole_head_tables
from biroute.model.attention.rule import RouteRule

BASE: dict[str, Any] = {
    "region_size": 4, "query_block_size": 1, "topk": 4, "descriptors_per_region": 1, "descriptor": "pre_rope",
    "force_own": True, "force_previous": False, "attention_sink": False,
}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "region_size": {"region_size": 8},
    "query_block_size": {"query_block_size": 2},
    "topk": {"topk": 5},
    "descriptors_per_region": {"descriptors_per_region": 2},
    "descriptor": {"descriptor": "post_rope"},
    "force_own": {"force_own": False},
    "force_previous": {"force_previous": True},
    "attention_sink": {"attention_sink": True},
}


def chosen_route(attention: dict[str, Any], objective: str, q: Tensor, k: Tensor) -> Tensor:
    """The route of a forward pass."""
    sizes = {"num_heads": 2, "num_kv_heads": 1, "hidden_size": 16, "sequence_length": 64, "key_smear": False}
    model = config_from_tree({"model": sizes | {"objective": objective, "attention": attention}}, "test").model
    core = CoreAttention(model, 0, num_kv_heads=1)
    seen: list[Tensor] = []
    core.on_route = lambda _, route: seen.append(route)
    core(q, k, torch.randn_like(k))
    return seen[0]


def expected_route(attention: dict[str, Any], causal: bool, q: Tensor, k: Tensor) -> Tensor:
    fields = dict(attention)
    if fields.pop("descriptor") == "post_rope":
        q, k = (apply_rotary(x, *rotary_tables(64, 0, 8, 10_000.0, x.device)) for x in (q, k))
    return reference.route_regions(q, k, RouteRule(causal=causal, **fields))


@pytest.mark.parametrize("objective", ["causal", "mlm"])
@pytest.mark.parametrize("field", CHANGES)
def test_every_field_reaches_the_route(field: str, objective: str) -> None:
    if field == "force_own" and objective == "causal":
        with pytest.raises(Exception, match="a causal token must see itself"):
            chosen_route(BASE | CHANGES[field], objective, torch.zeros(0), torch.zeros(0))
        return
    q, k = torch.randn(2, 2, 64, 8), torch.randn(2, 1, 64, 8)
    changed = BASE | CHANGES[field]
    route = chosen_route(changed, objective, q, k)
    assert torch.equal(route, expected_route(changed, objective == "causal", q, k))
    base = chosen_route(BASE, objective, q, k)
    assert route.shape != base.shape or not torch.equal(route, base)


def test_a_random_router_draws_another_route_for_each_layer() -> None:
    sizes = {"num_heads": 2, "num_kv_heads": 1, "hidden_size": 16, "sequence_length": 64, "num_layers": 2}
    model = config_from_tree({"model": sizes | {"attention": BASE | {"router": "random"}}}, "test").model
    q, k = torch.randn(1, 2, 64, 8), torch.randn(1, 1, 64, 8)
    first, again, second = (CoreAttention(model, layer, num_kv_heads=1).route(q, k) for layer in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("objective", ["causal", "mlm"])
def test_a_gpu_takes_dense_attention_where_every_region_is_routed(
    objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit; with one region less the kernels run, here in the interpreter, and their sums differ."""
    for module in (core, grid, partial, routing):
        monkeypatch.setattr(module, "KERNEL_DEVICES", {"cpu"})
    q, k, v = torch.randn(1, 2, 64, 8), torch.randn(1, 1, 64, 8), torch.randn(1, 1, 64, 8)
    table = rotary_tables(64, 0, 8, 10_000.0, q.device)
    dense = dense_attention(apply_rotary(q, *table), apply_rotary(k, *table), v, causal=objective == "causal")
    for topk, routed in ((17, False), (16, False), (15, True)):
        sizes = {"num_heads": 2, "num_kv_heads": 1, "hidden_size": 16, "sequence_length": 64, "key_smear": False}
        tree = {"model": sizes | {"objective": objective, "attention": BASE | {"topk": topk}}}
        layer = CoreAttention(config_from_tree(tree, "test").model, 0, num_kv_heads=1)
        assert torch.equal(layer(q, k, v), dense) is not routed


def test_smearing_and_the_rope_base_reach_the_output() -> None:
    sizes = {"num_heads": 2, "num_kv_heads": 1, "hidden_size": 16, "sequence_length": 16, "dense_layers": [0]}
    q, k, v = torch.randn(1, 2, 16, 8), torch.randn(1, 1, 16, 8), torch.randn(1, 1, 16, 8)

    def output(**fields: Any) -> Tensor:
        model = config_from_tree({"model": sizes | fields | {"num_layers": 1}}, "test").model
        return CoreAttention(model, 0, num_kv_heads=1)(q, k, v)

    plain = output(key_smear=False)
    assert not torch.allclose(output(key_smear=True), plain)
    assert not torch.allclose(output(key_smear=False, rope_base=50.0), plain)
    smeared = k + 0.5 * torch.cat((torch.zeros(1, 1, 1, 8), k[:, :, :-1]), 2)
    table = rotary_tables(16, 0, 8, 10_000.0, q.device)
    expected = torch.nn.functional.scaled_dot_product_attention(
        apply_rotary(q, *table), apply_rotary(smeared, *table), v, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(output(key_smear=True), expected)


def test_a_router_of_ones_own_decides_the_route() -> None:
    sizes = {"num_heads": 4, "num_kv_heads": 2, "hidden_size": 32, "sequence_length": 48}
    attention = {"region_size": 8, "topk": 3}
    layer = CoreAttention(
        config_from_tree({"model": sizes | {"attention": attention}}, "test").model, 0, num_kv_heads=2
    )
    own = torch.arange(48)[:, None] // 8
    route = torch.cat((own, torch.full((48, 2), -1)), 1).expand(2, 2, 48, 3)
    seen: list[tuple[int, Tensor]] = []
    layer.router = lambda q, k: route
    layer.on_route = lambda number, chosen: seen.append((number, chosen))
    q, k, v = torch.randn(2, 4, 48, 8), torch.randn(2, 2, 48, 8), torch.randn(2, 2, 48, 8)
    changed = v.clone()
    changed[:, :, :8] += 1.0
    with torch.no_grad():
        before, after = layer(q, k, v), layer(q, k, changed)
    assert torch.equal(before[:, :, 8:], after[:, :, 8:])  # each token sees its own region only
    assert not torch.equal(before[:, :, :8], after[:, :, :8])
    assert [number for number, _ in seen] == [0, 0] and seen[0][1] is route


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_is_rotated_to_the_bits_of_a_sequence(dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 48, 3, 16).to(dtype)
    tables = rotary_tables(48, 0, 16, 10_000.0, x.device)
    expected = apply_rotary(x.transpose(2, 3), *tables).transpose(2, 3)
    cosines, sines = whole_head_tables(48, 16, 10_000.0, x.device)
    for token in range(48):
        assert torch.equal(rotate_token(x[:, :, token], cosines[token], sines[token]), expected[:, :, token])
