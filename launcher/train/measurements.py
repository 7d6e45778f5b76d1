"""What a log point measures: times, memory, exchange, load of the nodes and, now and then, the routes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist

from biroute.configs.layout import Layout
from biroute.configs.schema import ParallelConfig, RunConfig, TrainConfig
from biroute.launcher.plan.hardware import load_hardware
from biroute.launcher.train.memory import memory_metrics
from biroute.launcher.train.routing_health import RoutingHealth
from biroute.launcher.train.stragglers import Stragglers
from biroute.launcher.train.system_metrics import SystemMetrics
from biroute.model.flops import train_flops_per_step
from biroute.parallel.engine.engine import Engine
from biroute.parallel.phase_clock import COMMUNICATION
from biroute.parallel.region.traffic_metrics import exchange_metrics


class Measurements:
    """Measures the steps of a run on all ranks. Every rank has one, and all call it in the same order.

    Attributes:
        routing: samples the routes; None if they are not to be.
    """

    def __init__(
        self, engine: Engine, system: SystemMetrics | None = None, stragglers: Stragglers | None = None
    ) -> None:
        """Measure `engine`; `system` adds the load of the nodes, `stragglers` compares the ranks."""
        self._engine, self._train = engine, engine.config.train
        self._system, self._stragglers = system, stragglers
        self._communication = timed_communication(engine.mesh.layout, engine.config.parallel)
        self._seconds_at_peak = seconds_at_peak(engine.config, dist.get_world_size())
        routing = RoutingHealth(engine.config, engine)
        self.routing = routing if routing.layers and self._train.route_metrics_every else None

    def during(self, step: int) -> AbstractContextManager[None]:
        """Watch a training step, which runs inside."""
        if self.routing is None or not samples_routes(self._train, step):
            return nullcontext()
        return self.routing.sampling()

    def gather(self, step: int, step_seconds: Sequence[float]) -> dict[str, float]:
        """Return what was measured since the last log point, given the seconds of each step since. Collective."""
        phases, device = self._engine.clock.take(), self._engine.device
        worst = {"time/step_seconds": sum(step_seconds) / len(step_seconds), **memory_metrics(device)}
        rows = _gather_rows([*phases.values(), *worst.values()], device)
        by_rank = [dict(zip(phases, row, strict=False)) for row in rows]
        highest = [max(column) for column in list(zip(*rows, strict=True))[len(phases) :]]
        values = dict(zip(worst, highest, strict=True))
        if self._seconds_at_peak is not None:
            values["throughput/mfu"] = self._seconds_at_peak / values["time/step_seconds"]
        shown = [name for name in phases if name not in COMMUNICATION or name in self._communication]
        values |= {f"time/{name}_seconds": sum(one[name] for one in by_rank) / len(rows) for name in shown}
        if self._stragglers is not None:
            values |= self._stragglers.judge(by_rank)
        if self._engine.traffic is not None:
            values |= exchange_metrics(self._engine.traffic, len(step_seconds))
        if self.routing is not None and samples_routes(self._train, step):
            values |= self.routing.gather()
        if self._system is not None:
            values |= self._system.gather()
        return values


def _gather_rows(row: Sequence[float], device: torch.device) -> list[list[float]]:
    """Return the equally long rows of all ranks, by rank. Collective."""
    mine = torch.tensor(row, dtype=torch.float64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    rows: list[list[float]] = torch.stack(everyone).tolist()
    return rows


def timed_communication(layout: Layout, parallel: ParallelConfig) -> set[str]:
    """Return the phases of communication that there are in a layout and that can be told apart from computation."""
    found = {"comm_pipeline"} if layout.pipe > 1 else set()
    if layout.region > 1:
        found.add("comm_region")
    # ZeRO-3 reduces gradients and gathers weights beside the computation.
    if layout.data * layout.region > 1 and layout.zero_stage < 3 and not parallel.overlap_grad_reduce:
        found.add("comm_data")
    return found


def seconds_at_peak(config: RunConfig, ranks: int) -> float | None:
    """Return how long the model operations of a step take at the peak rate of `train.hardware`; None without one.

    The model FLOPs utilization is this over the time of a step; recomputation is not counted.

    Raises:
        UsageError: there is no such hardware profile, or it is not valid.

    Source: PaLM (arXiv:2204.02311), appendix B.
    """
    if not config.train.hardware:
        return None
    hardware = load_hardware(config.train.hardware, "train.hardware=")
    return train_flops_per_step(config) / ranks / hardware.flops_per_second(config.train.precision)


def is_log_point(train: TrainConfig, step: int) -> bool:
    """Return whether a point is logged after this step: the first, the last and each `log_every`."""
    return step in (1, train.steps) or step % train.log_every == 0


def samples_routes(train: TrainConfig, step: int) -> bool:
    """Return whether the routes of this step are sampled; on a resume the same steps are."""
    every = train.route_metrics_every
    return every > 0 and (step in (1, train.steps) or step % (train.log_every * every) == 0)
