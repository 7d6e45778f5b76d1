"""The routes that are shown are those of training's forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cached import cached_model, random_tokens, recorded_routes, tiny_config

from biroute.launcher.routes.record import read_routes

MODELS: dict[str, dict[str, Any]] = {
    "a route for each token": {"attention": {"query_block_size": 1, "descriptors_per_region": 4}},
    "a route for two tokens, no smearing": {"attention": {"query_block_size": 2}, "key_smear": False},
    "a dense layer and a sliding window": {"dense_layers": [0], "sliding_window_layers": [1]},
    "every region": {"attention": {"topk": 6}},
}


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("length", [48, 29, 1])
def test_they_are_those_of_training(changes: dict[str, Any], length: int) -> None:
    model = cached_model(tiny_config(changes, exact_sums=True))
    tokens = random_tokens(length)
    with recorded_routes(model) as routes, torch.no_grad():
        model.layers(torch.tensor([tokens + random_tokens(48 - length, seed=9)]))
    of_training = {layer: route[0] for layer, route in routes}
    layers = read_routes(model, tokens)
    assert [one.layer for one in layers] == [0, 1]
    for one in layers:
        if one.kind == "dense":
            assert one.route is None and one.layer not in of_training
            continue
        assert one.route is not None
        blocks = -(-length // one.query_block_size)
        assert one.route.shape[:2] == (2, blocks)
        assert torch.equal(one.route, of_training[one.layer][:, :blocks])


def test_what_listened_before_listens_again() -> None:
    model = cached_model(tiny_config())
    with recorded_routes(model) as routes:
        read_routes(model, [1, 2, 3])
        assert not routes
        model.prefill([1, 2, 3])
        assert routes
