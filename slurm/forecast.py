"""What the plan says of a submission: whether it fits in memory, and its time beside the time limit. No torch.

Only where the cluster profile names a hardware profile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from biroute.configs.cluster_profile import load_profile
from biroute.configs.errors import UsageError
from biroute.configs.layout import resolve_layout
from biroute.configs.schema import RunConfig
from biroute.launcher.attempts.run_files import CHECKPOINTS
from biroute.launcher.plan.cluster import fitting_change, plan_on_cluster
from biroute.launcher.plan.hardware import GIB
from biroute.launcher.plan.prediction import Plan
from biroute.launcher.plan.report import duration, too_large
from biroute.parallel.checkpoint.files import list_checkpoints
from biroute.parallel.checkpoint.meta import read_meta
from biroute.slurm import client
from biroute.slurm.run_folder import RunFolder


@dataclass(frozen=True)
class Forecast:
    """A plan beside the time limit of a job and the steps that are left."""

    plan: Plan
    done_steps: int  # in the newest readable checkpoint
    time_limit_seconds: int | None  # None: not known here, or none
    signal_seconds: int  # before the limit the job saves and ends

    @property
    def remaining_steps(self) -> int:
        return max(0, self.plan.config.train.steps - self.done_steps)

    @property
    def remaining_seconds(self) -> float:
        """Predicted time of the remaining steps, without evaluations, checkpoints and starts."""
        return self.remaining_steps * self.plan.step.total

    @property
    def jobs(self) -> int | None:
        """Jobs of the time limit that the remaining steps take, one after the other; None without a known limit."""
        if self.time_limit_seconds is None:
            return None
        return max(1, math.ceil(self.remaining_seconds / max(1, self.time_limit_seconds - self.signal_seconds)))

    def check_fits(self) -> None:
        """Refuse a run that no device can hold.

        Raises:
            UsageError: the predicted peak is above the memory of a device; the line says by how much, and what would
                make it fit.
        """
        plan = self.plan
        if plan.fits:
            return
        raise UsageError(
            f"{too_large(plan, fitting_change(plan))}; this is the plan's prediction: without `hardware` in the "
            "cluster profile it is not asked"
        )

    def lines(self) -> list[str]:
        """Return the forecast in words."""
        plan = self.plan
        lines = [
            f"predicted on {plan.hardware.device}: {_gib(plan.memory.total)} of "
            f"{plan.hardware.memory_gib:g} GiB, {plan.step.total:.3g} s a step, "
            f"{plan.tokens_per_second:,.0f} tokens/s",
            f"steps left: {self.remaining_steps:,} of {plan.config.train.steps:,}, "
            f"predicted to take {duration(self.remaining_seconds)}{self._beside_limit()}",
        ]
        if not plan.fits:
            lines.append("warning: by the plan, this does not fit into the memory of a device")
        return lines

    def _beside_limit(self) -> str:
        if self.jobs is None or self.time_limit_seconds is None:
            return ""
        limit = f"; the time limit is {duration(self.time_limit_seconds)}"
        if self.jobs == 1:
            return limit
        requeue = self.plan.config.slurm.requeue
        how = "the job is queued again each time" if requeue else "slurm.requeue is off: resume it each time"
        return f"{limit}, so {self.jobs:,} starts ({how})"

    def as_values(self) -> dict[str, Any]:
        """Return the forecast as plain values, in bytes and seconds."""
        plan = self.plan
        return {
            "device": plan.hardware.device,
            "memory_bytes": {"total": plan.memory.total, "device": plan.device_bytes},
            "fits": plan.fits,
            "step_seconds": plan.step.total,
            "tokens_per_second": plan.tokens_per_second,
            "done_steps": self.done_steps,
            "remaining_steps": self.remaining_steps,
            "remaining_seconds": self.remaining_seconds,
            "time_limit_seconds": self.time_limit_seconds,
            "jobs": self.jobs,
        }


def make_forecast(plan: Plan, time_limit: str | None) -> Forecast:
    """Set a plan beside the time limit of its job, in Slurm's format, and the newest checkpoint of its run folder."""
    config = plan.config
    seconds = client.seconds_of(time_limit) if time_limit else None
    return Forecast(plan, _done_steps(config), seconds, config.slurm.signal_seconds)


def forecast_of_run(run: RunFolder) -> Forecast | None:
    """Return the forecast of a submitted run, from what was frozen; None if its profile names no hardware profile.

    Raises:
        UsageError: what was frozen is not usable.
    """
    config = run.config()
    if config is None or not config.slurm.profile:
        return None
    ranks = config.slurm.nodes * (config.slurm.ranks_per_node or 1)
    plan = plan_on_cluster(config, resolve_layout(config, ranks))
    if plan is None:
        return None
    return make_forecast(plan, config.slurm.time_limit or load_profile(config.slurm.profile).time_limit)


def _done_steps(config: RunConfig) -> int:
    """Return the step that the run goes on from: that of the newest checkpoint that can be read."""
    for path in list_checkpoints(config.train.run_dir / CHECKPOINTS):
        try:
            return read_meta(path).progress.step
        except (OSError, ValueError, UsageError):
            continue  # loading skips it, too, and reports it
    return 0


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}" if size >= 10 * GIB else f"{size / GIB:.3g}"
