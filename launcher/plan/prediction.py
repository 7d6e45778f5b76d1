"""A plan: everything that `biroute plan` says about one configuration on one layout. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from biroute.configs.layout import Layout
from biroute.configs.schema import RunConfig
from biroute.launcher.plan.communication import (
    ASSUMED_EXCHANGE,
    Axis,
    RegionExchange,
    Traffic,
    bytes_by_axis,
    traffic,
)
from biroute.launcher.plan.communication import region_exchange as exchange_of
from biroute.launcher.plan.hardware import GIB, HardwareProfile
from biroute.launcher.plan.memory import Memory, peak_memory
from biroute.launcher.plan.step_time import StepTime, step_time
from biroute.launcher.plan.workload import Execution, Workload
from biroute.model.flops import parameter_count, train_flops_per_step


@dataclass(frozen=True)
class Plan:
    """What a configuration needs on a layout, and how long it takes."""

    work: Workload
    hardware: HardwareProfile
    exchange_fraction: float = ASSUMED_EXCHANGE

    @property
    def config(self) -> RunConfig:
        return self.work.config

    @property
    def layout(self) -> Layout:
        return self.work.layout

    @cached_property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return parameter_count(self.config)

    @cached_property
    def flops_per_step(self) -> int:
        """Model operations of a step; recomputation is not counted."""
        return train_flops_per_step(self.config)

    @cached_property
    def _peak(self) -> tuple[Memory, int]:
        return peak_memory(self.work, self.exchange_fraction)

    @property
    def memory(self) -> Memory:
        """Peak memory of the rank that needs most."""
        return self._peak[0]

    @property
    def memory_stage(self) -> int:
        """The pipeline stage of that rank, from 0."""
        return self._peak[1]

    @property
    def device_bytes(self) -> float:
        """Memory of a device in bytes."""
        return self.hardware.memory_gib * GIB

    @property
    def fits(self) -> bool:
        """Whether the peak fits into a device."""
        return self.memory.total <= self.device_bytes

    @cached_property
    def traffic(self) -> list[Traffic]:
        """What a rank of a stage in the middle of the pipeline sends in a step."""
        return traffic(self.work, self.busiest_stage, self.exchange_fraction)

    @property
    def busiest_stage(self) -> int:
        """A stage that sends both ways, from 0."""
        return min(1, self.layout.pipe - 1)

    @property
    def bytes_by_axis(self) -> dict[Axis, float]:
        """Bytes that a rank sends in a step, by axis."""
        return bytes_by_axis(self.traffic)

    @cached_property
    def region_exchange(self) -> RegionExchange | None:
        """What region ranks exchange in routed layers; None with one region rank."""
        if self.layout.region == 1:
            return None
        return exchange_of(self.work, self.busiest_stage, self.exchange_fraction)

    @cached_property
    def step(self) -> StepTime:
        """Predicted time of a step, by part."""
        return step_time(self.work, self.hardware, self.exchange_fraction)

    @property
    def tokens_per_second(self) -> float:
        return self.config.tokens_per_step / self.step.total

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization, of the devices' peak (PaLM, arXiv:2204.02311, appendix B)."""
        peak = self.layout.world_size * self.hardware.flops_per_second(self.config.train.precision)
        return self.flops_per_step / self.step.total / peak

    @property
    def seconds(self) -> float:
        """Time of all steps, without evaluation, checkpoints and restarts."""
        return self.step.total * self.config.train.steps

    @property
    def device_hours(self) -> float:
        return self.layout.world_size * self.seconds / 3600

    @property
    def cost(self) -> float | None:
        """Price of all device-hours; None without a price."""
        price = self.hardware.price_per_device_hour
        return None if price is None else price * self.device_hours


def make_plan(
    config: RunConfig, layout: Layout, hardware: HardwareProfile, exchange_fraction: float = ASSUMED_EXCHANGE
) -> Plan:
    """Plan `config` on `layout` as BiRoute would train it; nothing is computed before it is asked for."""
    execution = Execution.of(config, cpu=hardware.cpu is not None)
    return Plan(Workload(config, layout, execution), hardware, exchange_fraction)
