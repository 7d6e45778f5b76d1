"""All layouts of a number of devices: which are legal, which fit, and which is fastest. No torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from pydantic import ValidationError

from biroute.configs.errors import UsageError
from biroute.configs.layout import resolve_layout
from biroute.configs.schema import ParallelConfig, RunConfig, TrainConfig
from biroute.launcher.plan.hardware import HardwareProfile
from biroute.launcher.plan.prediction import Plan, make_plan

TOO_LARGE = "needs more memory than the device has"


@dataclass(frozen=True)
class Found:
    """The plans that fit, the fastest first, and how many others fell out for each reason.

    `smallest` is the one that needs least memory of those that do not fit, where none fits.
    """

    plans: list[Plan]
    dropped: Mapping[str, int]
    smallest: Plan | None = None


def search_layouts(config: RunConfig, devices: int, hardware: HardwareProfile, exchange_fraction: float) -> Found:
    """Try every layout of `devices` ranks, with and without sequence parallelism and recomputation.

    The batch and everything else stay as in `config`; its `parallel.data` is left out.

    Raises:
        UsageError: no layout is legal; the line has the commonest reason.
    """
    plans, dropped, smallest = list[Plan](), Counter[str](), None
    for parallel, recompute in _candidates(devices):
        try:
            changed = changed_config(config, parallel, {"activation_checkpointing": recompute})
            layout = resolve_layout(changed, devices)
        except UsageError as error:
            dropped[reason_of(str(error))] += 1
            continue
        plan = make_plan(changed, layout, hardware, exchange_fraction)
        if plan.fits:
            plans.append(plan)
        else:
            dropped[TOO_LARGE] += 1
            if smallest is None or plan.memory.total < smallest.memory.total:
                smallest = plan
    if not plans and not dropped[TOO_LARGE]:
        reason, count = dropped.most_common(1)[0]
        raise UsageError(f"--search: no layout of {devices} ranks is legal; the commonest reason ({count}): {reason}")
    plans.sort(key=lambda plan: (plan.step.total, plan.memory.total))
    return Found(plans, dict(dropped.most_common()), None if plans else smallest)


def _candidates(devices: int) -> Iterator[tuple[dict[str, Any], bool]]:
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    for tensor, region, pipeline in product(sizes, repeat=3):
        if devices % (tensor * region * pipeline):
            continue
        for zero, sequence_parallel, recompute in product(range(4), (False, True), (False, True)):
            if sequence_parallel and tensor == 1:
                continue  # it has no effect there
            axes = {"tensor": tensor, "region": region, "pipeline": pipeline, "data": None}
            yield {**axes, "zero_stage": zero, "sequence_parallel": sequence_parallel}, recompute


def changed_config(
    config: RunConfig, parallel: Mapping[str, Any] | None = None, train: Mapping[str, Any] | None = None
) -> RunConfig:
    """Return `config` with some fields of its sections `parallel` and `train` changed, all checks included.

    Raises:
        UsageError: the values do not go together.
    """
    sections = {name: getattr(config, name) for name in RunConfig.model_fields}
    try:
        # A section that is already checked is not checked again.
        if parallel:
            sections["parallel"] = ParallelConfig(**{**_values(config.parallel), **parallel})
        if train:
            sections["train"] = TrainConfig(**{**_values(config.train), **train})
        return RunConfig(**sections)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UsageError(message) from None


def _values(section: ParallelConfig | TrainConfig) -> dict[str, Any]:
    return {name: getattr(section, name) for name in section.model_fields_set}


def reason_of(message: str) -> str:
    """Cut the numbers of one layout out of an error, so that equal reasons count as one."""
    head = re.split(r"; | = ", message)[0]
    return re.sub(r"(parallel\.\w+|pipeline|zero_stage)=\d+", r"\1", head)


def remedy(plan: Plan) -> str | None:
    """Return the first single change that makes a plan fit, as an override; None if there is none.

    Args:
        plan: a plan that does not fit.
    """
    config, layout = plan.config, plan.layout
    tries: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    if not config.train.activation_checkpointing:
        tries.append(("train.activation_checkpointing=true", {}, {"activation_checkpointing": True}))
    tries += [
        (f"parallel.zero_stage={stage}", {"zero_stage": stage}, {}) for stage in range(layout.zero_stage + 1, 4)
    ]
    if config.train.microbatch_size > 1:
        tries.append(("train.microbatch_size=1", {}, {"microbatch_size": 1}))
    for axis in ("tensor", "region", "pipeline"):
        size = 2 * getattr(config.parallel, axis)
        while size <= layout.world_size:
            free = " parallel.data=null" if config.parallel.data else ""  # another axis leaves fewer ranks for data
            tries.append((f"parallel.{axis}={size}{free}", {axis: size}, {}))
            size *= 2
    for override, parallel, train in tries:
        try:
            changed = changed_config(config, {"data": None, **parallel}, train)
            other = make_plan(
                changed, resolve_layout(changed, layout.world_size), plan.hardware, plan.exchange_fraction
            )
        except UsageError:
            continue
        if other.fits:
            return override
    return None
