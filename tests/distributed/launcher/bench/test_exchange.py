"""What the exchange benchmark runs on real ranks: bytes as planned, and as the route of one process foresees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.pool import WorkerPool
from helpers.training import CPU, batch_of_step, small_config

from biroute.configs.layout import resolve_layout
from biroute.configs.schema import RunConfig
from biroute.launcher.bench.exchange.measure import recorded_routes
from biroute.launcher.bench.exchange.plan import descriptor_bytes, single_process_plan
from biroute.launcher.bench.exchange.ranks import RankJob, forward_and_backward
from biroute.model.language_model import LayerSequence, loss_function, plan_layers
from biroute.parallel.engine.engine import region_shard
from biroute.parallel.mesh.mesh import build_mesh
from biroute.parallel.phase_clock import PhaseClock

Ranks = Callable[[int], WorkerPool]


def configuration(ranks: int) -> RunConfig:
    """Layer 1 dense, layer 2 local, layers 0 and 3 routed: only those have a plan that counts."""
    return small_config(
        model={"sequence_length": 96, "attention": {"region_size": 4, "topk": 5}},
        parallel={"region": ranks, "data": 1},
        train={"global_batch_size": 2},
    )


def rank_job(ranks: int, way: str) -> dict[str, Any]:
    config = configuration(ranks)
    parallel = config.parallel.model_copy(update={"region_exchange": way})
    config = config.model_copy(update={"parallel": parallel})
    return forward_and_backward(RankJob(config, None, batch_of_step(config, 1)), CPU)


def single_job() -> tuple[dict[int, torch.Tensor], float]:
    config = configuration(1)
    module = LayerSequence(plan_layers(config, build_mesh(resolve_layout(config, 1)).groups))
    batch = batch_of_step(config, 1)
    with torch.no_grad(), recorded_routes(module) as routes:
        loss = loss_function(config.model)(module(batch.inputs), *batch.targets)
    recorded = {layer: len(route) for layer, route in routes.items()}
    with torch.no_grad():
        module(batch.inputs)
    assert {layer: len(route) for layer, route in routes.items()} == recorded, "recording ended with the block"
    return routes, float(loss)


def routes_job(ranks: int) -> dict[int, torch.Tensor]:
    """Routes of this rank's tokens by the whole model on shared sequences."""
    config = configuration(ranks)
    mesh = build_mesh(resolve_layout(config, ranks))
    module = LayerSequence(plan_layers(config, mesh.groups, region_shard(config, mesh, PhaseClock())))
    with torch.no_grad(), recorded_routes(module) as routes:
        module(mesh.own_tokens(batch_of_step(config, 1).inputs))
    return routes


@pytest.mark.parametrize("count", [2, 8])
def test_the_sharded_model_routes_as_one_process(count: int, ranks: Ranks) -> None:
    ((single, _),) = ranks(1).run(single_job)
    shards = ranks(count).run(routes_job, count)
    for layer, route in single.items():
        whole = torch.cat([shard[layer] for shard in shards], 2)
        different = int((whole != route).any(-1).sum())
        # Layer 0 sees the same bits. Behind it hidden states differ by rounding, and with them affinities that are
        # equal within rounding: in a model of random weights hardly any.
        assert different <= (0 if layer == 0 else 0.01 * route[..., 0].numel()), f"layer {layer}: {different} rows"


@pytest.mark.parametrize(("count", "way"), [(2, "auto"), (4, "auto"), (4, "ship")])
def test_measured_bytes_are_those_of_the_plan(count: int, way: str, ranks: Ranks) -> None:
    ((routes, loss),) = ranks(1).run(single_job)
    reports = ranks(count).run(rank_job, count, way)
    assert sorted(routes) == [0, 3]
    assert all(route.shape == (2, 2, 96, 5) for route in routes.values()), "one pass was recorded, no more"
    for report in reports:
        assert report["payload"] == report["planned"]
        # Two routed layers and two sequences.
        gathered = 2 * 2 * descriptor_bytes(configuration(1)) * (count - 1) / count
        assert report["received"]["descriptors"] == gathered
    assert sum(report["loss"] for report in reports) / count == pytest.approx(loss, rel=1e-5)
    if way == "auto":
        # Only affinities that are equal within rounding may be chosen differently.
        planned = sum(report["planned"] for report in reports)
        assert planned == pytest.approx(single_process_plan(configuration(1), routes, count), rel=0.02)
    else:
        kinds = [report["received"] for report in reports]
        assert sum(kind["results"] for kind in kinds) > 0
        assert sum(kind.get("keys", 0) for kind in kinds) == 0
