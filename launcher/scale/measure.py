"""What a finished size has measured, from its run folder, and what is computed of it beforehand. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from biroute.configs.errors import EXIT_OK, UsageError
from biroute.launcher.attempts.journal import read_attempts
from biroute.launcher.attempts.run_files import METRICS_LOG, UPLOAD_STATE
from biroute.launcher.plan.communication import bytes_by_axis, traffic
from biroute.launcher.plan.hardware import GIB, HardwareProfile
from biroute.launcher.plan.prediction import Plan, make_plan
from biroute.launcher.plan.workload import Execution, Workload
from biroute.launcher.scale.study import Size
from biroute.launcher.track.metrics_log import Point, read_points
from biroute.launcher.track.upload_state import read_state

STEP = "time/step_seconds"
_PHASES = ("data", "forward", "backward", "exchange", "optimizer")  # as `time/<phase>_seconds`


@dataclass(frozen=True)
class Measured:
    """Medians over the steps of a size, without its first ones."""

    size: Size
    first_step: int  # of those that count
    steps: int  # that count
    step_seconds: float
    fastest_seconds: float
    slowest_seconds: float
    phases: dict[str, float]  # seconds of a step, mean over ranks; "other" is what no phase has
    peak_gib: float  # of the worst rank
    region_bytes: float | None  # that a rank receives in a step, mean over ranks; None with one region rank
    ended_ms: int  # time of the last point
    run_id: str  # in MLflow; "" if the run is not tracked

    @property
    def ranks(self) -> int:
        return self.size.ranks

    @property
    def tokens_per_second(self) -> float:
        return self.size.config.tokens_per_step / self.step_seconds

    def efficiency(self, base: Measured) -> float:
        """Return tokens per second and rank, as a share of those of the size `base`."""
        return self.tokens_per_second / self.ranks / (base.tokens_per_second / base.ranks)


def steps_of(size: Size) -> list[Point]:
    """Return the points of the training steps in the order of the steps; none before the run has begun."""
    try:
        points = read_points(size.run_dir / METRICS_LOG)
    except OSError:
        return []
    return sorted((point for point in points if STEP in point.metrics), key=lambda point: point.step)


def is_finished(size: Size) -> bool:
    """Return whether the run of a size has ended with its last step."""
    attempts = read_attempts(size.run_dir)
    steps = steps_of(size)
    return bool(attempts and steps) and attempts[-1].status == EXIT_OK and steps[-1].step >= size.config.train.steps


def measure(size: Size) -> Measured:
    """Read what a finished size has measured. The first fifth of its steps, at least one, is left out: warm-up.

    Raises:
        UsageError: its metrics log is damaged.
    """
    points = steps_of(size)
    first = max(1, size.config.train.steps // 5) + 1
    counted = [point for point in points if point.step >= first]
    if not counted:
        raise UsageError(f"{size.run_dir / METRICS_LOG}: holds no step from {first} on; remove {size.run_dir}")
    seconds = [point.metrics[STEP] for point in counted]
    phases = {name: _median(counted, f"time/{name}_seconds") for name in _PHASES}
    phases["other"] = max(0.0, median(seconds) - sum(phases.values()))
    return Measured(
        size=size,
        first_step=first,
        steps=len(counted),
        step_seconds=median(seconds),
        fastest_seconds=min(seconds),
        slowest_seconds=max(seconds),
        phases=phases,
        peak_gib=max(point.metrics.get("memory/peak_gib", 0.0) for point in points),
        region_bytes=_median(counted, "exchange/region_bytes") if size.layout.region > 1 else None,
        ended_ms=points[-1].time_ms,
        run_id=_run_id(size),
    )


def _median(points: Sequence[Point], name: str) -> float:
    values = [point.metrics[name] for point in points if name in point.metrics]
    return median(values) if values else 0.0


def _run_id(size: Size) -> str:
    try:
        return read_state(size.run_dir / UPLOAD_STATE).run_id or ""
    except (OSError, ValueError, TypeError):
        return ""


def plan_of(size: Size, hardware: HardwareProfile | None) -> Plan | None:
    """Plan a size on nodes of a hardware profile; None without one."""
    return None if hardware is None else make_plan(size.config, size.layout, hardware)


def computed_bytes(size: Size) -> dict[str, float]:
    """Return the bytes that a rank sends in a step by axis, from sizes alone: `launcher.plan`."""
    work = Workload(size.config, size.layout, Execution.of(size.config))
    return {str(axis): sent for axis, sent in bytes_by_axis(traffic(work, min(1, size.layout.pipe - 1))).items()}


def as_values(one: Measured, base: Measured, plan: Plan | None, base_plan: Plan | None) -> dict[str, Any]:
    """Return a size as plain values: seconds, bytes, tokens/s."""
    values: dict[str, Any] = {
        "ranks": one.ranks,
        "layout": str(one.size.layout),
        "global_batch_size": one.size.config.train.global_batch_size,
        "tokens_per_step": one.size.config.tokens_per_step,
        "run": one.size.run_dir.name,
        "mlflow_run_id": one.run_id,
        "steps_counted": one.steps,
        "step_seconds": one.step_seconds,
        "fastest_step_seconds": one.fastest_seconds,
        "slowest_step_seconds": one.slowest_seconds,
        "phase_seconds": one.phases,
        "tokens_per_second": one.tokens_per_second,
        "efficiency": one.efficiency(base),
        "peak_gib": one.peak_gib,
        "region_bytes": one.region_bytes,
        "computed_bytes": computed_bytes(one.size),
        "predicted": None,
    }
    if plan is not None and base_plan is not None:
        values["predicted"] = {
            "device": plan.hardware.device,
            "step_seconds": plan.step.total,
            "part_seconds": plan.step.parts(),
            "tokens_per_second": plan.tokens_per_second,
            "efficiency": plan.tokens_per_second / one.ranks / (base_plan.tokens_per_second / base.ranks),
            "peak_gib": plan.memory.total / GIB,
        }
    return values


def metrics_of(values: dict[str, Any]) -> dict[str, float]:
    """Return what MLflow shows of a size on the parent run, by metric."""
    shown = {name: values[name] for name in ("step_seconds", "tokens_per_second", "efficiency", "peak_gib")}
    shown |= {f"{name}_seconds": seconds for name, seconds in values["phase_seconds"].items()}
    if values["region_bytes"] is not None:
        shown["region_bytes"] = values["region_bytes"]
    shown |= {f"computed_{axis}_bytes": sent for axis, sent in values["computed_bytes"].items() if sent}
    if values["predicted"] is not None:
        names = ("step_seconds", "tokens_per_second", "efficiency", "peak_gib")
        shown |= {f"predicted_{name}": values["predicted"][name] for name in names}
    return {f"scaling/{name}": float(value) for name, value in shown.items()}
