"""Training steps of `biroute bench gpu`, on the real engine: over which routes they attend, and what they leave."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
from helpers.pool import WorkerPool
from torch import Tensor, nn

from biroute.configs.schema import ModelConfig
from biroute.launcher.bench.gpu import measure, steps
from biroute.launcher.bench.gpu.layer import Layer
from biroute.launcher.bench.gpu.llama import llama_steps
from biroute.model.attention.core import CoreAttention

CPU = torch.device("cpu")
MODEL = ModelConfig(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, sequence_length=64)
LAYER = Layer(region_size=16, topk=2)
PER_REGION = torch.tensor([[[[0, -1], [0, 1], [0, 2], [0, 3]]]], dtype=torch.int32)  # no router forces the first one
ROUTES = {1: PER_REGION.repeat_interleave(16, 2), 16: PER_REGION}

Followed = tuple[int, int, Tensor]  # tokens of a query block, layer, the route that attention got


def measure_watched(
    routes: dict[int, Tensor], layer: Layer
) -> tuple[list[dict[str, Any]], list[Followed], list[tuple[int, Tensor]]]:
    """Rows, the routes that attention got, and what the layers' own routers chose in vain, by query block."""
    followed, in_vain = list[Followed](), list[tuple[int, Tensor]]()
    build, choose, ticks = steps.build_engine, steps.route_regions, count()

    def build_watched(config: Any, *rest: Any) -> Any:
        engine = build(config, *rest)
        for core in engine.deepspeed.modules():
            if isinstance(core, CoreAttention):
                core.on_route = lambda layer, route, core=core: followed.append((core.query_block_size, layer, route))
        return engine

    def choose_watched(q: Tensor, k: Tensor, rule: Any) -> Tensor:
        in_vain.append((rule.query_block_size, choose(q, k, rule)))
        return in_vain[-1][1]

    steps.build_engine, steps.route_regions = build_watched, choose_watched
    rows = steps.measure_steps(lambda: float(next(ticks)), 2, MODEL, layer, CPU, routes)
    return rows, followed, in_vain


def test_steps_attend_over_the_routes_that_are_given(ranks: Callable[[int], WorkerPool]) -> None:
    ((rows, followed, in_vain),) = ranks(1).run(measure_watched, ROUTES, LAYER)
    dense, per_token, per_region = rows
    assert [row["num_tokens"] for row in rows] == [64] * 3
    assert (dense["kind"], per_token["query_block_size"], per_region["query_block_size"]) == ("dense", 1, 16)
    assert all(row["region_size"] == 16 and row["topk"] == 2 for row in (per_token, per_region))
    assert [row["routes"] for row in rows] == [None, "trained", "trained"]
    # Two layers in turn, a warm-up and two repeats; the dense model has no routes.
    assert [(block, layer) for block, layer, _ in followed] == [(1, 0), (1, 1), (16, 0), (16, 1)] * 3
    assert all(torch.equal(route, ROUTES[block].long()) for block, _, route in followed)
    # The router runs as often, since its time counts; what it chose is something else.
    assert [block for block, _ in in_vain] == [block for block, _, _ in followed]
    assert not any(torch.equal(own, ROUTES[block].long()) for block, own in in_vain)


def test_steps_without_given_routes_attend_over_their_own(ranks: Callable[[int], WorkerPool]) -> None:
    ((rows, followed, in_vain),) = ranks(1).run(measure_watched, {}, LAYER)
    assert [row["routes"] for row in rows] == [None, "random", "random"]
    assert len(followed) == 3 * 4 and not in_vain
    assert not any(torch.equal(route, ROUTES[block].long()) for block, _, route in followed)


def test_where_all_regions_are_routed_no_route_is_given(ranks: Callable[[int], WorkerPool]) -> None:
    """A layer with a given route would not see that dense attention is the same."""
    ((rows, _, in_vain),) = ranks(1).run(measure_watched, ROUTES, Layer(region_size=16, topk=4))
    assert [row["routes"] for row in rows] == [None, "all regions", "all regions"]
    assert not in_vain


def survivors_of_each_length(precision: Any) -> tuple[list[tuple[int, int]], int]:
    """Before each row but that of an engine, what is left of engines and how many parameters; watched in all."""
    watched, found = list[weakref.ref[Any]](), list[tuple[int, int]]()
    build, timed = steps.build_engine, steps._seconds

    def build_watched(*arguments: Any) -> Any:
        engine = build(*arguments)
        optimizer = engine.deepspeed.optimizer
        masters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        weights = [parameter for _, parameter in engine.named_parameters()]
        watched.extend(weakref.ref(one) for one in (engine, engine.deepspeed, optimizer, *masters, *weights))
        return engine

    def timed_watched(engines: Any, *rest: Any) -> list[float]:
        seconds = timed(engines, *rest)
        states = [state for engine in engines for state in engine._adam.state.values()]
        watched.extend(weakref.ref(state[name]) for state in states for name in ("exp_avg", "exp_avg_sq"))
        return seconds

    def look() -> None:
        # By type, as some libraries' lazy objects warn when they are asked what they are.
        parameters = sum(issubclass(type(one), nn.Parameter) for one in gc.get_objects())
        found.append((sum(one() is not None for one in watched), parameters))

    def fail(*_: Any) -> Any:
        look()
        raise MemoryError  # a row that fails costs no other

    def uncompiled_llama(*arguments: Any, compiled: bool) -> Any:
        look()
        return llama_steps(*arguments, compiled=False)

    steps.build_engine, steps._seconds, steps.PRECISION = build_watched, timed_watched, {"cpu": precision}
    measure.measure_layer = measure.measure_parts = fail
    measure.llama_steps = uncompiled_llama
    answer = measure.run_bench(CPU, [64, 128], 1, layer=LAYER, step_model=MODEL)
    assert len(answer["train_steps"]) == 2 * (3 + 2)
    look()
    return found, len(watched)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_of_a_length_is_left_for_the_next(ranks: Callable[[int], WorkerPool], precision: str) -> None:
    """DeepSpeed has another optimizer for bf16, which is what GPUs use."""
    ((found, watched),) = ranks(1).run(survivors_of_each_length, precision)
    assert found == [(0, 0)] * (2 * 6 + 1)
    assert watched > 2 * 3 * (3 + 2 + 2 * 2)  # engines, of each three objects, master weights and moments
