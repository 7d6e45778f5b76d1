"""Time of communication by axis, in every layout that has one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
from helpers.pool import WorkerPool
from helpers.training import small_config, start_engine, train

Ranks = Callable[[int], WorkerPool]
NAP = 0.1


def late_job(parallel: dict[str, int], collective: str) -> tuple[dict[str, float], set[str]]:
    """Metrics of a step in which each call of a collective of torch takes a nap more, and the phases of the calls."""
    import torch.distributed as dist

    from biroute.launcher.train.measurements import Measurements

    original, phases = getattr(dist, collective), set[str]()

    def late(*arguments: Any, **options: Any) -> Any:
        time.sleep(NAP)
        groups = [x for x in (*arguments, *options.values()) if isinstance(x, dist.ProcessGroup)]
        if all(dist.get_world_size(group) > 1 for group in groups):  # Megatron-core also asks a lone tensor rank
            phases.update(engine.clock._running[-1:])
        return original(*arguments, **options)

    engine = start_engine(small_config(parallel=parallel))
    measurements = Measurements(engine)
    if engine.config.parallel.zero_stage == 2:
        engine.deepspeed.optimizer.reduce_bucket_size = 1000  # so that buckets fill, and are reduced, in backward
    train(engine, [1])
    engine.clock.take()
    engine.clock.begin_step(logged=True)
    with patch.object(dist, collective, late):
        train(engine, [2])
    engine.clock.end_step()
    return measurements.gather(2, [1.0]), phases


@pytest.mark.parametrize(
    ("parallel", "collective", "axes"),
    [
        ({"data": 2, "zero_stage": 0}, "all_reduce", {"data"}),
        ({"data": 2, "zero_stage": 1}, "all_reduce", {"data"}),
        ({"data": 2, "zero_stage": 2}, "all_reduce", {"data"}),
        ({"data": 2, "zero_stage": 3}, "all_reduce", set()),
        ({"pipeline": 2, "zero_stage": 1}, "send", {"pipeline"}),
        ({"region": 2, "zero_stage": 1}, "all_gather_into_tensor", {"region", "data"}),
        ({"tensor": 2, "zero_stage": 1}, "all_reduce", set()),
    ],
)
def test_a_slow_collective_counts_for_its_axis(
    ranks: Ranks, parallel: dict[str, int], collective: str, axes: set[str]
) -> None:
    (found, phases), (other, _) = ranks(2).run(late_job, parallel, collective)
    assert found == pytest.approx(other)
    timed = {
        name.removeprefix("time/comm_").removesuffix("_seconds"): value
        for name, value in found.items()
        if "comm_" in name
    }
    assert set(timed) == axes
    if axes:
        slow = "region" if "region" in axes else next(iter(axes))
        assert timed[slow] >= NAP
        assert found["time/exchange_seconds"] >= sum(timed.values()) * 0.999
        assert f"comm_{slow}" in phases and not phases & {"forward", "backward"}
