"""Rates of one core, each apart, for `biroute bench hardware`: attention by path, routing, elementwise, AdamW.

Each is measured at a size of its own. Where two costs add up (the softmax of a pair and its products, say), two sizes
give both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from biroute.configs.layout import resolve_layout
from biroute.configs.schema import AttentionConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from biroute.launcher.plan.cpu_time import (
    BACKWARD_COPIES,
    BACKWARD_PRODUCTS,
    FORWARD_COPIES,
    FORWARD_PRODUCTS,
    dense_pairs,
)
from biroute.launcher.plan.step_time import OPTIMIZER_BYTES, elementwise_bytes
from biroute.launcher.plan.workload import LOSS_BYTES, Execution, Workload
from biroute.model.attention.bi_level import bi_level_attention, dense_attention
from biroute.model.attention.grid import AttentionPath
from biroute.model.attention.paths import ComputedPairs, masked_pairs, tiled_pairs
from biroute.model.attention.routing import route_regions
from biroute.model.attention.rule import RouteRule
from biroute.model.block import Block
from biroute.model.language_model import loss_function
from biroute.parallel.engine.engine import Microbatch, build_engine
from biroute.parallel.mesh.mesh import Mesh, build_mesh

Clock = Callable[[Callable[[], Any]], float]  # median seconds of a call
HEADS, GROUPS, TOPK = 6, 3, 6  # of attention that is measured
SMALL_HEAD, MIDDLE_HEAD, LARGE_HEAD = 24, 48, 80
DENSE_TOKENS, MASKED_TOKENS, TILED_TOKENS = 1536, 768, 3072
REGION, SMALL_REGION = 64, 16
BLOCK = ModelConfig(
    hidden_size=288, num_layers=1, num_heads=9, num_kv_heads=3, sequence_length=768,
    attention=AttentionConfig(kind="dense"),
)  # fmt: skip
TINY = BLOCK.model_copy(update={"hidden_size": 36, "head_size": 4, "ffn_hidden_size": 32, "sequence_length": 16})
SEQUENCES, VOCABULARY, LOSS_TOKENS = 2, 1536, 1024
WIDE = BLOCK.model_copy(update={"num_layers": 3, "hidden_size": 360, "head_size": 40, "sequence_length": 16})
OPTIMIZER_STEPS = 9
ROUNDS = 20


def measure_cpu(clock: Clock, mesh: Mesh, linear_rate: float) -> dict[str, Any]:
    """Measure the fields of `CpuRates` on this rank alone, and the time of a whole block. No collective.

    Args:
        clock: measures a call.
        mesh: of data ranks only.
        linear_rate: of matrix products in FLOP/s, which a block's time is cleared of.
    """
    found = _attention(clock, linear_rate) | _routing(clock)
    return found | _block(clock, mesh, linear_rate, found["dense"]) | _loss(clock)


def data_mesh(ranks: int) -> Mesh:
    """Build the mesh of data ranks that blocks and engine are measured on. Collective."""
    return build_mesh(resolve_layout(_config(BLOCK, ranks), ranks))


def _config(model: ModelConfig, ranks: int) -> RunConfig:
    train = TrainConfig(global_batch_size=ranks * SEQUENCES, microbatch_size=SEQUENCES)
    return RunConfig(model=model, data=DataConfig(), train=train)


def _qkv(tokens: int, head_size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> Tensor:
        return torch.randn(1, heads, tokens, head_size, generator=generator).requires_grad_()

    return draw(HEADS), draw(GROUPS), draw(GROUPS)


def _times(clock: Clock, attend: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[float, float]:
    """Return the seconds of forward and of backward."""
    with torch.no_grad():
        forward = clock(lambda: attend(*inputs))
    out = attend(*inputs)
    upstream = torch.ones_like(out)
    return forward, clock(lambda: torch.autograd.grad(out, inputs, upstream, retain_graph=True))


def _attention(clock: Clock, linear_rate: float) -> dict[str, Any]:
    """Return the rates of each path, from two head sizes, and of gathering, from a third setting."""

    def dense(head_size: int) -> tuple[float, float]:
        return _times(clock, lambda q, k, v: dense_attention(q, k, v, causal=True), _qkv(DENSE_TOKENS, head_size))

    def routed(path: AttentionPath, tokens: int, size: int, block: int, head_size: int) -> tuple[float, float]:
        inputs = _qkv(tokens, head_size)
        route = route_regions(inputs[0], inputs[1], RouteRule(size, block, TOPK, True))

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            found: Tensor = bi_level_attention(
                q, k, v, route, region_size=size, query_block_size=block, causal=True, path=path
            )
            return found

        return _times(clock, attend, inputs)

    dense_pairs_of_all = ComputedPairs(dense_pairs(DENSE_TOKENS, 1, True), 0.0)
    dense_rate = _fit({size: dense(size) for size in (SMALL_HEAD, LARGE_HEAD)}, dense_pairs_of_all, linear_rate)
    masked_rate = _fit(
        {size: routed("masked", MASKED_TOKENS, REGION, REGION, size) for size in (SMALL_HEAD, LARGE_HEAD)},
        masked_pairs(MASKED_TOKENS, REGION, True),
        linear_rate,
    )
    large, small = (
        tiled_pairs(
            regions=(0, TILED_TOKENS // size), region_size=size, query_block_size=block, heads=HEADS // GROUPS,
            topk=TOPK, causal=True,
        )
        for size, block in ((REGION, REGION), (SMALL_REGION, 1))
    )  # fmt: skip
    times = {size: routed("query_major", TILED_TOKENS, REGION, REGION, size) for size in (SMALL_HEAD, LARGE_HEAD)}
    third = sum(routed("region_major", TILED_TOKENS, SMALL_REGION, 1, MIDDLE_HEAD))
    # Where a tile is a few keys, gathered rows are most of its time; where it is a region of keys and a whole block
    # of queries, they are little. So a few rounds find both.
    copied = (FORWARD_COPIES + BACKWARD_COPIES) * small.gathered * MIDDLE_HEAD * 4
    tiles, gather = dict[str, float](), 0.0
    for _ in range(ROUNDS):
        tiles = _fit(times, large, linear_rate, gather)
        gather = max((third / HEADS - pair_seconds(tiles, MIDDLE_HEAD) * small.pairs) / copied, 1e-13)
    return {"dense": dense_rate, "masked": masked_rate, "tiles": tiles, "gather_gb_per_second": 1e-9 / gather}


def pair_seconds(rate: dict[str, float], head_size: int) -> float:
    """Return the seconds of a pair, forward and backward."""
    products = FORWARD_PRODUCTS / rate["forward_gflops"] + BACKWARD_PRODUCTS / rate["backward_gflops"]
    return 1e-9 * (rate["forward_pair_ns"] + rate["backward_pair_ns"] + 2 * head_size * products)


def _fit(
    times: dict[int, tuple[float, float]], computed: ComputedPairs, linear_rate: float, gather: float = 0.0
) -> dict[str, float]:
    """Return the fields of `AttentionRate`: what a pair takes grows linearly with the head size.

    Args:
        times: head size -> seconds of forward and of backward, for two head sizes.
        computed: the pairs and copies of one head.
        linear_rate: of large matrix products in FLOP/s, which those of attention do not surpass.
        gather: seconds of a copied byte.
    """
    found = {}
    for place, (name, products, copies) in enumerate(
        (("forward", FORWARD_PRODUCTS, FORWARD_COPIES), ("backward", BACKWARD_PRODUCTS, BACKWARD_COPIES))
    ):
        low, high = (
            (times[size][place] / HEADS - copies * computed.gathered * size * 4 * gather) / computed.pairs
            for size in (SMALL_HEAD, LARGE_HEAD)
        )
        slope = max((high - low) / (LARGE_HEAD - SMALL_HEAD), 2 * products / linear_rate)
        found[f"{name}_pair_ns"] = 1e9 * max(0.0, (low + high - slope * (SMALL_HEAD + LARGE_HEAD)) / 2)
        found[f"{name}_gflops"] = 2e-9 * products / slope
    return found


def _routing(clock: Clock) -> dict[str, float]:
    """Return the rate of affinities and the time of a choice, from two numbers of descriptors."""
    q, k, _ = (x.detach() for x in _qkv(TILED_TOKENS, MIDDLE_HEAD))

    def seconds(descriptors: int) -> float:
        rule = RouteRule(SMALL_REGION, 1, TOPK, True, descriptors_per_region=descriptors)
        return clock(lambda: route_regions(q, k, rule))

    one, several = seconds(1), seconds(8)
    choices = GROUPS * TILED_TOKENS * (TILED_TOKENS // SMALL_REGION)
    product = max((several - one) / 7, 1e-3 * one) / choices  # of one descriptor with one query
    return {"routing_gflops": 2e-9 * MIDDLE_HEAD / product, "choice_ns": 1e9 * max(0.0, one / choices - product)}


def _block(clock: Clock, mesh: Mesh, linear_rate: float, dense: dict[str, float]) -> dict[str, float]:
    """Return the rate of what a block does beyond its products and its attention, and the times of both blocks."""
    tiny, whole = (clock(block_step(model, mesh)) for model in (TINY, BLOCK))
    config = _config(BLOCK, mesh.layout.world_size)
    work = Workload(config, mesh.layout, Execution.of(config, cpu=True))
    pairs = dense_pairs(BLOCK.sequence_length, 1, True) * BLOCK.num_heads * SEQUENCES
    attended = pair_seconds(dense, BLOCK.head_size) * pairs
    rest = whole - tiny - 3 * work.linear_flops / linear_rate - attended
    moved = 3 * elementwise_bytes(work)
    return {
        "elementwise_gb_per_second": 1e-9 * moved / max(rest, 0.05 * whole),
        "block_ms": 1e3 * tiny,
        "whole_block_ms": 1e3 * whole,
    }


def block_step(model: ModelConfig, mesh: Mesh) -> Callable[[], Any]:
    """Return a call of a block's forward and backward."""
    block = Block(model, 0, mesh.groups)
    hidden = torch.randn(model.sequence_length, SEQUENCES, model.hidden_size).requires_grad_()
    upstream = torch.randn_like(hidden)
    wanted = [hidden, *block.parameters()]
    return lambda: torch.autograd.grad(block(hidden), wanted, upstream, allow_unused=True)


def _loss(clock: Clock) -> dict[str, float]:
    loss = loss_function(BLOCK)
    logits = torch.randn(LOSS_TOKENS, 1, VOCABULARY).requires_grad_()
    labels = torch.randint(VOCABULARY, (1, LOSS_TOKENS))
    seconds = clock(lambda: torch.autograd.grad(loss(logits, labels), logits))
    return {"loss_gb_per_second": 1e-9 * LOSS_BYTES * logits.numel() / seconds}


def measure_optimizer(mesh: Mesh) -> float:
    """Return the rate of the engine's whole optimizer step: DeepSpeed copies, measures and clips gradients, too.

    Collective. In bytes/s, as a plan counts them.
    """
    ranks = mesh.layout.world_size
    engine = build_engine(_config(WIDE, ranks), mesh, torch.device("cpu"))
    tokens = torch.zeros(SEQUENCES, WIDE.sequence_length, dtype=torch.int64)
    times = []
    for step in range(OPTIMIZER_STEPS):
        engine.clock.begin_step(logged=True)
        engine.train_step([Microbatch(tokens, tokens)], 1e-4)
        engine.clock.end_step()
        phases = engine.clock.take()
        # Of one rank there is nothing to sum, and the phase of sums is copies.
        times += [phases["optimizer"] + (phases["comm_data"] if ranks == 1 else 0.0)] if step > 1 else []
    parameters = sum(parameter.numel() for _, parameter in engine.named_parameters()) / ranks
    return (OPTIMIZER_BYTES + 4) * parameters / statistics.median(times)
