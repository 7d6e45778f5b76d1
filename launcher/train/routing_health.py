"""Samples the routes of training steps, and sums up the health of each layer's on all ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from biroute.configs.schema import RunConfig
from biroute.model.attention.core import CoreAttention, route_rule
from biroute.model.attention.route_health import count_route, health_of, num_counts
from biroute.parallel.engine.engine import Engine


class RoutingHealth:
    """Health of the routes of one sequence of a step: the first one of data rank 0, in its first microbatch.

    Every layer whose attention is bi_level is sampled, on the pipeline stage that has it; each tensor rank counts its
    own heads, each region rank its own query blocks. So another layout samples the same, but for `layer_overlap`
    across pipeline stages and `block_overlap` across region ranks, which leave out what another rank holds.
    """

    def __init__(self, config: RunConfig, engine: Engine) -> None:
        self._model, self._device = config.model, engine.device
        self.layers = [n for n in range(self._model.num_layers) if self._model.attention_kind(n) == "bi_level"]
        mine = engine.mesh.at.data == 0
        self._cores = [
            module
            for module in engine.deepspeed.module.modules()
            if mine and isinstance(module, CoreAttention) and module.kind == "bi_level"
        ]
        self._core_of = {core.layer: core for core in self._cores}
        self.counting_seconds = 0.0  # of the host, in the last step that was sampled
        self._counts: dict[int, Tensor] = {}
        self._before: tuple[int, Tensor] | None = None  # the layer that was counted last, and its route

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Count the routes of the step inside. Nothing waits for the device; nothing that is computed changes."""
        self._counts.clear()
        self.counting_seconds = 0.0
        for core in self._cores:
            core.on_route = self._count
        try:
            yield
        finally:
            for core in self._cores:
                core.on_route = None
            self._before = None

    def _count(self, layer: int, route: Tensor) -> None:
        if layer in self._counts:  # another microbatch, or activation checkpointing, which computes it again
            return
        started = time.perf_counter()
        core = self._core_of[layer]
        before, route_GNK = self._before, route[0]
        self._counts[layer] = count_route(
            route_GNK,
            route_rule(self._model, layer),
            self._model.num_regions,
            first_block=core.first_token // core.query_block_size,
            before_GNK=before[1] if before is not None and before[0] == layer - 1 else None,
        )
        self._before = (layer, route_GNK)
        self.counting_seconds += time.perf_counter() - started

    def gather(self) -> dict[str, float]:
        """Return the health of all layers in the sampled step, and its mean over layers. Collective."""
        model = self._model
        table = torch.zeros(
            len(self.layers),
            model.num_kv_heads,
            num_counts(model.num_regions),
            dtype=torch.float64,
            device=self._device,
        )
        for layer, counts in self._counts.items():
            first = self._core_of[layer].first_kv_head
            table[self.layers.index(layer), first : first + len(counts)] = counts
        self._counts.clear()
        dist.all_reduce(table)
        return name_health(
            {
                layer: health_of(counts, route_rule(model, layer), model.num_regions)
                for layer, counts in zip(self.layers, table.tolist(), strict=True)
            }
        )


def name_health(layers: dict[int, dict[str, float]]) -> dict[str, float]:
    """Name the health of layers as MLflow shows it: each layer's, and the mean over those that have the quantity."""
    named = {
        f"routing/layer_{layer:02d}/{name}": value for layer, found in layers.items() for name, value in found.items()
    }
    for name in dict.fromkeys(name for found in layers.values() for name in found):
        values = [found[name] for found in layers.values() if name in found]
        named[f"routing/{name}"] = sum(values) / len(values)
    return named
