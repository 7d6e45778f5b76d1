"""Every field of `model` reaches the model: what is built, and what it computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.pool import WorkerPool
from helpers.training import small_config, tokens_of_step
from torch import Tensor

from biroute.configs.layout import resolve_layout
from biroute.model.language_model import LayerSequence, plan_layers
from biroute.parallel.mesh.mesh import build_mesh

Ranks = Callable[[int], WorkerPool]
Shape = tuple[int, ...]

BLOCK = "block.0.layer."
# Field -> its value, and the shapes of weights that follow from it. Without it: C = 32, H = 4, G = 2, D = 8, V = 384.
SIZES: dict[str, tuple[Any, dict[str, Shape | None]]] = {
    "hidden_size": (48, {"embedding.weight": (384, 48), f"{BLOCK}self_attention.linear_proj.weight": (48, 48)}),
    "num_layers": (3, {"block.2.layer.input_layernorm.weight": (32,), "block.3.layer.input_layernorm.weight": None}),
    "num_heads": (2, {f"{BLOCK}self_attention.linear_qkv.weight": ((2 + 2 * 2) * 16, 32)}),
    "num_kv_heads": (4, {f"{BLOCK}self_attention.linear_qkv.weight": ((4 + 2 * 4) * 8, 32)}),
    "head_size": (6, {f"{BLOCK}self_attention.linear_proj.weight": (32, 4 * 6)}),
    "ffn_hidden_size": (40, {f"{BLOCK}mlp.linear_fc1.weight": (80, 32), f"{BLOCK}mlp.linear_fc2.weight": (32, 40)}),
    "vocab_multiple": (7, {"embedding.weight": (301, 32)}),
    "qk_norm": (True, {f"{BLOCK}self_attention.q_layernorm.weight": (8,)}),
    "tied_embeddings": (False, {"head.projection.weight": (384, 32)}),
    "key_smear": (False, {f"{BLOCK}self_attention.core_attention.key_smear.share": None}),
}
# Fields that change no weight, but what is made of them.
RULES: dict[str, Any] = {
    "objective": "mlm",
    "rope_base": 100.0,
    "norm_epsilon": 0.1,
    "dense_layers": [0, 1],
    "sliding_window_layers": [0, 2],
}
ATTENTION: dict[str, Any] = {
    "kind": "dense",
    "region_size": 8,
    "query_block_size": 4,
    "topk": 4,
    "descriptor": "post_rope",
    "descriptors_per_region": 4,
    "force_previous": False,
    "attention_sink": True,
    "router": "random",
}


def built(model: dict[str, Any]) -> LayerSequence:
    config = small_config(model=model)
    return LayerSequence(plan_layers(config, build_mesh(resolve_layout(config, 1)).groups))


def shapes_job(model: dict[str, Any]) -> dict[str, Shape]:
    return {name: tuple(weight.shape) for name, weight in built(model).named_weights()}


def logits_job(model: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return built(model)(tokens_of_step(small_config(), 1)[0][:2])


def deviation_job(model: dict[str, Any]) -> dict[str, float]:
    """Standard deviation of each large matrix as it was drawn."""
    weights = built(model).named_weights()
    return {name: float(weight.detach().std()) for name, weight in weights if weight.numel() > 2000}


@pytest.mark.parametrize("field", SIZES)
def test_a_size_is_that_of_the_weights(ranks: Ranks, field: str) -> None:
    value, expected = SIZES[field]
    (found,) = ranks(1).run(shapes_job, {field: value})
    assert {name: found.get(name) for name in expected} == expected
    (base,) = ranks(1).run(shapes_job, {})
    assert any(base.get(name) != shape for name, shape in expected.items())


@pytest.mark.parametrize("field", [*RULES, *(f"attention.{field}" for field in ATTENTION)])
def test_a_rule_changes_the_logits(ranks: Ranks, field: str) -> None:
    """That they are the right ones is for the oracles, `test_core.py` and `test_routing.py`."""
    changed: dict[str, Any] = {field: RULES.get(field)}
    base = {"region_size": 4, "topk": 3, "query_block_size": 1, "descriptors_per_region": 1}
    if field.startswith("attention."):
        name = field.removeprefix("attention.")
        changed = {"attention": {**base, name: ATTENTION[name]}}
    (before,), (after,) = ranks(1).run(logits_job, {}), ranks(1).run(logits_job, changed)
    assert before.shape == after.shape
    assert not torch.allclose(before, after, rtol=1e-3, atol=1e-4)


def test_weights_are_drawn_with_the_given_deviation(ranks: Ranks) -> None:
    (found,) = ranks(1).run(deviation_job, {"init_std": 0.05, "tied_embeddings": False})
    into_residual = {name for name in found if "linear_fc2" in name or "linear_proj" in name}
    assert into_residual
    assert len(found) - len(into_residual) > 8
    for name, deviation in found.items():
        expected = 0.05 / math.sqrt(2 * 4) if name in into_residual else 0.05
        assert deviation == pytest.approx(expected, rel=0.05), name
