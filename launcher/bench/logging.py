"""`biroute bench logging`: what logging and routing health cost per step, with and without in turn."""

from __future__ import annotations

import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from biroute.configs.schema import RunConfig
from biroute.launcher.bench.report import Findings, Page, Table, environment_info, say
from biroute.launcher.bench.several_processes import CPU
from biroute.launcher.bench.single_process import join_alone
from biroute.launcher.track.tracker import Tracker, open_tracker
from biroute.launcher.train.measurements import Measurements
from biroute.launcher.train.stragglers import Stragglers
from biroute.launcher.train.system_metrics import SystemMetrics
from biroute.parallel.engine.engine import Engine, Microbatch, build_engine
from biroute.parallel.mesh.mesh import Mesh

_FIRST = 1  # a step that every setting logs and samples
PLAIN, LOGGED, SAMPLED = "plain step", "with a log point", "with a log point and routing health"


def run_bench(config: RunConfig, rounds: int) -> dict[str, Any]:
    """Time steps of one data rank on random tokens: plain, logged, and logged with routes sampled, in turn.

    Args:
        config: of the run; its layout is left out, its batch is that of one data rank.
        rounds: steps of each kind, after one of each for warm-up.
    """
    config, mesh = _alone(config)
    every, log_every = config.train.route_metrics_every, config.train.log_every
    engine = build_engine(config, mesh, CPU)
    logged, sampled = (_measurements(engine, mesh, with_routes) for with_routes in (False, True))
    batches = _batches(config)
    found: dict[str, list[float]] = {PLAIN: [], LOGGED: [], SAMPLED: [], "log point": [], "routing health": []}
    with tempfile.TemporaryDirectory(prefix="biroute-bench-") as folder:
        tracker = open_tracker(config, Path(folder), tags={})
        for number in range(rounds + 1):
            step = {PLAIN: _step(engine, batches, None, tracker, 3 * number)}
            step[LOGGED] = _step(engine, batches, logged, tracker, 3 * number + 1)
            step[SAMPLED] = _step(engine, batches, sampled, tracker, 3 * number + 2)
            if number:  # the first round warms up
                for name, (whole, _) in step.items():
                    found[name].append(whole)
                found["log point"].append(step[LOGGED][1])
                found["routing health"].append(max(0.0, step[SAMPLED][1] - step[LOGGED][1]))
                say(f"round {number}: " + ", ".join(f"{name} {values[-1]:.4f} s" for name, values in found.items()))
        tracker.close("FINISHED")
    plain = statistics.median(found[PLAIN])
    costs = [
        (log / log_every + (health / log_every / every if every else 0.0)) / plain
        for log, health in zip(found["log point"], found["routing health"], strict=True)
    ]
    return {
        "environment": environment_info(),
        "log_every": log_every,
        "route_metrics_every": every,
        "seconds": found,
        "cost_percent": [100 * cost for cost in costs],
    }


def _alone(config: RunConfig) -> tuple[RunConfig, Mesh]:
    parallel = config.parallel.model_copy(update={"tensor": 1, "pipeline": 1, "region": 1, "data": 1})
    per_rank = max(config.train.microbatch_size, config.train.global_batch_size // (config.parallel.data or 1))
    train = config.train.model_copy(update={"global_batch_size": per_rank})
    tracking = config.tracking.model_copy(update={"enabled": False})
    alone = config.model_copy(update={"parallel": parallel, "train": train, "tracking": tracking})
    return alone, join_alone(alone)


def _measurements(engine: Engine, mesh: Mesh, with_routes: bool) -> Measurements:
    hosts = [socket.gethostname()]
    measurements = Measurements(engine, SystemMetrics(hosts, 0, CPU), Stragglers(mesh.layout, hosts, say))
    if not with_routes:
        measurements.routing = None
    return measurements


def _batches(config: RunConfig) -> list[Microbatch]:
    generator = torch.Generator().manual_seed(0)
    shape = (config.train.global_batch_size, config.model.sequence_length + 1)
    tokens = torch.randint(config.data.tokenizer.vocab_size, shape, generator=generator)
    return [
        Microbatch(part[:, :-1].contiguous(), part[:, 1:].contiguous())
        for part in tokens.split(config.train.microbatch_size)
    ]


def _step(
    engine: Engine, batches: Sequence[Microbatch], measurements: Measurements | None, tracker: Tracker, point: int
) -> tuple[float, float]:
    """Take a step; returns its seconds, and those of them that measuring and logging took."""
    started = time.perf_counter()
    engine.clock.begin_step(logged=measurements is not None)
    if measurements is None:
        engine.train_step(batches, 1e-4)
        engine.clock.end_step()
        return time.perf_counter() - started, 0.0
    with measurements.during(_FIRST):
        engine.train_step(batches, 1e-4)
    engine.clock.end_step()
    trained = time.perf_counter()
    tracker.log(point, measurements.gather(_FIRST, [trained - started]))
    routing = measurements.routing
    counting = 0.0 if routing is None else routing.counting_seconds
    return time.perf_counter() - started, time.perf_counter() - trained + counting


def logging_page(answer: dict[str, Any]) -> Page:
    """Return the page of this benchmark."""
    rows = [[name, *_spread(values, 1e3, 2)] for name, values in answer["seconds"].items()]
    cost = _spread(answer["cost_percent"], 1, 3)
    introduction = (
        "# Cost of logging and routing health\n\nSteps of one data rank on random tokens, plain, with a log point, "
        "and with a log point that samples the routes, in turn. *log point* is the time of gathering and writing it, "
        "*routing health* what counting and gathering the routes adds. What MLflow's thread does is not in it."
    )
    finding = (
        f"{cost[0]}% of a step ({cost[1]} to {cost[2]}) with a log point every {answer['log_every']} steps and "
        f"routes at every {answer['route_metrics_every']}-th of them."
    )
    table = Table("Milliseconds", ["", "median", "least", "most"], rows)
    return Page("logging", introduction, answer["environment"], [table, Findings([finding])])


def _spread(values: Sequence[float], factor: float, digits: int) -> list[str]:
    return [f"{factor * value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))]
