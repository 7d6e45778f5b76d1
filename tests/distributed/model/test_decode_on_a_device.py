"""What is made of a trained model on an emulated device: nothing mixes devices, and the results are the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import emulated_device
from helpers.cached import cached_model, random_tokens, tiny_config
from helpers.emulated_device import COUNTS, EmulatedTensor, Emulation, to_device
from helpers.pool import WorkerPool
from torch import Tensor

from biroute.launcher.evaluate.forward import ForwardModel
from biroute.launcher.generate.sampling import choose_token
from biroute.launcher.generate.settings import Settings
from biroute.launcher.routes.record import read_routes
from biroute.model.decode.cached_model import CachedModel
from biroute.model.language_model import LayerSequence

Ranks = Callable[[int], WorkerPool]
PROMPT, LENGTH, ROW = 21, 40, 33


def moved(layers: LayerSequence) -> LayerSequence:
    """The same layers, their weights on the device."""
    for module in layers.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(to_device(weight.detach()))
    return layers


def used(model: CachedModel, config: Any) -> dict[str, Any]:
    """What `generate`, `serve`, `evaluate` and `routes` ask of a model."""
    tokens = random_tokens(LENGTH)
    sequence, logits = model.prefill(tokens[:PROMPT])
    other, _ = model.prefill(tokens[:3])
    rows = [logits]
    COUNTS.clear()
    for token in tokens[PROMPT:]:
        rows.append(model.step([sequence, other], [token, token])[0])
    counted = sum(COUNTS.waits.values()), sum(COUNTS.copies.values())
    settings = Settings(temperature=0.7, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.1)
    losses = ForwardModel(model.layers, config).losses([np.array(tokens[:ROW])])
    return {
        "logits": torch.stack([on_cpu(row) for row in rows]),
        "every logit": on_cpu(model.every_logit(tokens)),
        "losses": torch.from_numpy(next(losses)),
        "drawn": choose_token(rows[-1], tokens, settings, 0.5).token,
        "routes": [layer.route for layer in read_routes(model, tokens)],
        "counted": counted,
    }


def on_cpu(x: Tensor) -> Tensor:
    return x.inner if isinstance(x, EmulatedTensor) else x


def decode_job(changes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was found on the device, and on the CPU, with sums of the same precision."""
    from megatron.core.transformer import transformer_layer

    emulated_device.activate()
    # Megatron-core lets one tensor take another one's data, which no dispatcher sees; it changes no value.
    transformer_layer.make_viewless_tensor = lambda inp, **_: inp
    config = tiny_config(changes)
    expected = used(CachedModel(cached_model(config).layers, config.model, exact=False), config)
    layers = moved(cached_model(config).layers)
    with Emulation():
        return used(CachedModel(layers, config.model), config), expected


KINDS = {
    "a route a token": {"attention": {"descriptors_per_region": 2}},
    "a route for 4 tokens": {"attention": {"query_block_size": 4, "topk": 3}},
    "every kind of layer": {"num_layers": 3, "dense_layers": [0], "sliding_window_layers": [1]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_model_is_used_on_a_device(ranks: Ranks, kind: str) -> None:
    ((found, expected),) = ranks(1).run(decode_job, KINDS[kind])
    for name in ("logits", "every logit", "losses"):
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert found["drawn"] == expected["drawn"]
    assert [None if route is None else route.tolist() for route in found["routes"]] == [
        None if route is None else route.tolist() for route in expected["routes"]
    ]
    waits, copies = found["counted"]
    steps = LENGTH - PROMPT
    assert copies == steps, "a step copies its tokens to the device, and nothing else"
    assert waits <= steps, "the host waits for the device less than once a token"
