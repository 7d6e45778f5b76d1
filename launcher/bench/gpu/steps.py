"""Part of `biroute bench gpu`: whole training steps of our model, dense and routed, by turns.

A model with fresh weights that reads white noise chooses routes of which neighbours share least. Where routes of a
trained model are given every routed layer lets its own router choose, since that time counts, but attends over the
given route, the same one in every layer: that is what the page on paper counts.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from biroute.configs.data_section import DataConfig, TokenizerConfig
from biroute.configs.schema import AttentionConfig, ModelConfig, RunConfig, TrainConfig
from biroute.launcher.bench.attention.train_step import StepVariant
from biroute.launcher.bench.gpu.layer import Layer
from biroute.launcher.bench.gpu.targets import STEP_TARGETS, STEP_VOCABULARY
from biroute.launcher.bench.rows import Row
from biroute.launcher.bench.single_process import join_alone
from biroute.model.attention.core import CoreAttention
from biroute.model.attention.routing import route_regions
from biroute.model.attention.rule import RouteRule
from biroute.parallel.engine.engine import Engine, Microbatch, build_engine

PRECISION: dict[str, Literal["fp32", "bf16"]] = {"cuda": "bf16", "cpu": "fp32"}
# The first collection takes DeepSpeed's optimizer for bf16, the second one the parameters that it held: a tensor that
# C++ refers to as well is no garbage to Python's collector.
COLLECTIONS = 2


def measure_steps(
    now: Callable[[], float],
    repeats: int,
    model: ModelConfig,
    layer: Layer,
    device: torch.device,
    routes: Mapping[int, Tensor],
) -> list[Row]:
    """Measure training steps over one sequence: dense, a route per token, a route per region.

    Args:
        now: a clock in seconds.
        repeats: steps of each, after one that warms up and compiles.
        model: the sizes, and the tokens of the sequence.
        layer: sizes of regions and routes.
        device: where it trains.
        routes: of a trained model, int32 [1, G, S // Lq, K] by tokens of a query block Lq; empty: the model's own.

    Returns:
        A row for each, without a ratio.
    """
    variants = _variants(model, layer)
    configs = [step_config(model, variant.attention, device) for variant in variants]
    mesh = join_alone(configs[0], device)
    kind = "trained" if routes else "random"
    if layer.topk * layer.region_size >= model.sequence_length:
        kind = "all regions"  # of which a layer makes dense attention, unless it is given a route
    engines = list[Engine]()
    try:
        for config in configs:
            engines.append(build_engine(config, mesh, device))
            attention = config.model.attention
            if kind == "trained" and attention.kind == "bi_level":
                _follow(engines[-1].deepspeed, routes[attention.query_block_size].to(device).long())
        seconds = _seconds(engines, now, repeats, device)
    finally:
        _destroy(engines)
    return [_row(model, variant, one, kind) for variant, one in zip(variants, seconds, strict=True)]


def free_memory() -> None:
    """Free what nothing refers to any more, and give the device's memory back."""
    for _ in range(COLLECTIONS):
        gc.collect()
    torch.cuda.empty_cache()


def _variants(model: ModelConfig, layer: Layer) -> list[StepVariant]:
    sizes = {"region_size": layer.region_size, "topk": layer.topk}
    target = STEP_TARGETS.get(model.sequence_length)
    return [
        StepVariant("dense", AttentionConfig(kind="dense")),
        StepVariant("one route per token", AttentionConfig(**sizes), target=target),
        StepVariant(
            "one route per region", AttentionConfig(query_block_size=layer.region_size, **sizes), target=target
        ),
    ]


def step_config(model: ModelConfig, attention: AttentionConfig, device: torch.device) -> RunConfig:
    """The configuration of a model whose steps are measured."""
    return RunConfig(
        model=model.model_copy(update={"attention": attention}),
        data=DataConfig(tokenizer=TokenizerConfig(vocab_size=STEP_VOCABULARY)),
        train=TrainConfig(global_batch_size=1, microbatch_size=1, precision=PRECISION[device.type]),
    )


def _follow(module: nn.Module, route: Tensor) -> None:
    """Let every routed layer attend over the route, after its own router has chosen."""
    for core in module.modules():
        if isinstance(core, CoreAttention) and core.rule is not None:
            core.router = partial(_choose_in_vain, core.rule, route)


def _choose_in_vain(rule: RouteRule, route: Tensor, q: Tensor, k: Tensor) -> Tensor:
    route_regions(q, k, rule)
    return route


def _seconds(engines: Sequence[Engine], now: Callable[[], float], repeats: int, device: torch.device) -> list[float]:
    """The median seconds of each engine's steps."""
    length = engines[0].config.model.sequence_length
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(STEP_VOCABULARY, (1, length + 1), generator=generator).to(device)
    batch = Microbatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def step(engine: Engine) -> float:
        started = now()
        engine.train_step([batch], learning_rate=1e-4)
        return now() - started

    rounds = [[step(engine) for engine in engines] for _ in range(repeats + 1)]
    return [statistics.median(column) for column in zip(*rounds[1:], strict=True)]  # the first round warms up


def _destroy(engines: list[Engine]) -> None:
    """Let DeepSpeed forget the engines: a module of its own keeps names by parameter, which hold all of an engine."""
    while engines:
        engines.pop().deepspeed.destroy()


def _row(model: ModelConfig, variant: StepVariant, seconds: float, routes: str) -> dict[str, Any]:
    return {
        "name": variant.name,
        "routes": None if variant.attention.kind == "dense" else routes,
        "num_tokens": model.sequence_length,
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        **variant.attention.model_dump(include={"kind", "region_size", "topk", "query_block_size"}),
        "seconds": seconds,
        "tokens_per_second": model.sequence_length / seconds,
        "target": variant.target,
    }
