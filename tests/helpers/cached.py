"""Small models in this process with a cache, and the routes that they choose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from biroute.configs.load import config_from_tree
from biroute.configs.schema import RunConfig
from biroute.model.attention.core import CoreAttention
from biroute.model.decode.cached_model import CachedModel
from biroute.model.language_model import LayerSequence, plan_layers
from biroute.parallel.mesh.megatron import groups_of_one

VOCABULARY = 320


def tiny_config(changes: dict[str, Any] | None = None, *, exact_sums: bool = False) -> RunConfig:
    """Two layers, four query heads in two groups, six regions of 8 tokens; `changes` are those of `model`."""
    changes = changes or {}
    attention = {"region_size": 8, "topk": 4, "descriptors_per_region": 1} | changes.get("attention", {})
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "sequence_length": 48}
    # Weights large enough that tokens differ from one another, and with them their routes.
    model = sizes | {"init_std": 0.1} | changes | {"attention": attention}
    data = {"tokenizer": {"vocab_size": VOCABULARY}}
    return config_from_tree({"model": model, "data": data, "train": {"exact_sums": exact_sums}}, "test")


def cached_model(config: RunConfig) -> CachedModel:
    """The model of `config` with random weights, those of norms and key smearing included."""
    layers = LayerSequence(plan_layers(config, groups_of_one(torch.device("cpu"))))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, weight in layers.named_weights():
            if weight.dim() == 1:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.3)
    return CachedModel(layers, config.model)


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@contextmanager
def recorded_routes(model: CachedModel) -> Iterator[list[tuple[int, Tensor]]]:
    """(layer, route) of each choice, in its order."""
    found: list[tuple[int, Tensor]] = []
    cores = [module for module in model.layers.modules() if isinstance(module, CoreAttention)]
    for core in cores:
        core.on_route = lambda layer, route: found.append((layer, route))
    try:
        yield found
    finally:
        for core in cores:
            core.on_route = None
