"""The whole model in one process: causality, recomputation, counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.pool import WorkerPool
from helpers.training import VOCABULARY, plain_torch_run, small_config

from biroute.configs.layout import resolve_layout
from biroute.configs.schema import RunConfig
from biroute.model.flops import attended_pairs, parameter_count
from biroute.model.language_model import LayerSequence, plan_layers
from biroute.parallel.mesh.mesh import build_mesh

Ranks = Callable[[int], WorkerPool]

CAUSAL_MODELS: dict[str, dict[str, Any]] = {
    "per token": {},
    "per block": {"attention": {"region_size": 4, "query_block_size": 2, "topk": 3}},
    "per region": {"attention": {"region_size": 4, "query_block_size": 4, "topk": 3}},
    "descriptors after RoPE": {"attention": {"region_size": 4, "topk": 3, "descriptor": "post_rope"}},
    "first region forced": {"attention": {"region_size": 4, "topk": 4, "attention_sink": True}},
    "random route": {"attention": {"region_size": 4, "topk": 4, "router": "random"}},
    "local": {"attention": {"region_size": 4, "topk": 3, "kind": "sliding_window"}},
    "dense": {"attention": {"region_size": 4, "kind": "dense"}},
    "keys not smeared": {"key_smear": False},
    "two descriptors": {"attention": {"region_size": 4, "topk": 3, "descriptors_per_region": 2}},
    "four descriptors after RoPE": {
        "attention": {"region_size": 4, "topk": 3, "descriptor": "post_rope", "descriptors_per_region": 4},
    },
    "query and key norm": {"qk_norm": True, "tied_embeddings": False},
}


def build(config: RunConfig) -> LayerSequence:
    return LayerSequence(plan_layers(config, build_mesh(resolve_layout(config, 1)).groups))


def earlier_outputs_changed_job(model: dict[str, Any]) -> tuple[int, int]:
    """Perturbations that changed any logit at or before the token they follow, and those that changed a later one."""
    config = small_config(model=model)
    module = build(config)
    length = config.model.sequence_length
    generator = torch.Generator().manual_seed(0)
    earlier = later = 0
    with torch.no_grad():
        for token in range(0, length - 1, 3):
            tokens = torch.randint(3, VOCABULARY, (2, length), generator=generator)
            changed = tokens.clone()
            changed[:, token + 1 :] = torch.randint(3, VOCABULARY, (2, length - token - 1), generator=generator)
            before, after = module(tokens), module(changed)  # [S, B, V]
            earlier += not torch.equal(before[: token + 1], after[: token + 1])
            later += not torch.equal(before[token + 1 :], after[token + 1 :])
    return earlier, later


@pytest.mark.parametrize("model", CAUSAL_MODELS)
def test_no_future_token_reaches_an_earlier_output(model: str, ranks: Ranks) -> None:
    assert ranks(1).run(earlier_outputs_changed_job, CAUSAL_MODELS[model]) == [(0, 11)]


def test_the_perturbation_test_can_fail(ranks: Ranks) -> None:
    ((earlier, _),) = ranks(1).run(earlier_outputs_changed_job, {"objective": "mlm"})
    assert earlier == 11


def recomputed_job(recompute: bool) -> Any:
    return plain_torch_run(small_config(train={"activation_checkpointing": recompute}), 2)


def test_recomputation_changes_nothing(ranks: Ranks) -> None:
    (kept_reports, kept), (again_reports, again) = (ranks(1).run(recomputed_job, value)[0] for value in (False, True))
    assert kept_reports == again_reports
    for name, values in kept.items():
        for kind, value in values.items():
            assert torch.equal(value, again[name][kind]), f"{name} {kind}"


def counts_job(model: dict[str, Any]) -> list[tuple[str, int, int]]:
    """(what, counted in the model, computed from the configuration)."""
    config = small_config(model=model)
    module = build(config)
    counts = [("parameters", sum(p.numel() for p in module.parameters()), parameter_count(config))]
    length, size = config.model.sequence_length, config.model.attention.region_size
    token = torch.arange(length)
    q, k = torch.randn(1, 4, length, 8), torch.randn(1, 2, length, 8)
    for layer in range(config.model.num_layers):
        core = module.layers[layer + 1].layer.self_attention.core_attention
        visible = token[None, :] <= token[:, None] if config.model.causal else torch.ones(length, length).bool()
        if core.kind != "dense":
            routed = torch.zeros(length, length // size + 1, dtype=torch.bool)
            route = core.route(q, k)[0, 0].repeat_interleave(core.query_block_size, 0)  # [S, topk]
            routed.scatter_(1, route % (length // size + 1), True)  # -1, empty, lands in the column that is cut off
            visible &= routed[:, :-1].repeat_interleave(size, 1)
        counts.append((f"pairs of layer {layer}", int(visible.sum()), attended_pairs(config, layer)))
    return counts


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"qk_norm": True, "tied_embeddings": False},
        {"objective": "mlm", "key_smear": False},
        {"attention": {"region_size": 8, "query_block_size": 4, "topk": 9}},
        {"attention": {"region_size": 4, "topk": 3, "kind": "sliding_window"}},
    ],
    ids=str,
)
def test_counts_are_exact(model: dict[str, Any], ranks: Ranks) -> None:
    for what, counted, computed in ranks(1).run(counts_job, model)[0]:
        assert counted == computed, what
