"""The same run on more nodes: each data rank keeps its sequences, so the batch grows with the nodes. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from biroute.configs.errors import UsageError
from biroute.configs.layout import resolve_layout
from biroute.launcher.plan.prediction import Plan, make_plan
from biroute.launcher.plan.search import changed_config

MOST_NODES = 4096


def weak_scaling(plan: Plan, most_nodes: int = MOST_NODES) -> Iterator[tuple[int, Plan]]:
    """Yield (devices, plan), from the plan itself on with twice the data ranks each time, up to `most_nodes`."""
    layout, sequences = plan.layout, plan.config.train.global_batch_size // plan.layout.data
    data = layout.data
    while True:
        devices = layout.world_size // layout.data * data
        if devices > most_nodes * plan.hardware.devices_per_node:
            return
        try:
            config = changed_config(
                plan.config,
                {"data": data},
                {"global_batch_size": sequences * data, "evaluate_sequences": None},
            )
            yield devices, make_plan(config, resolve_layout(config, devices), plan.hardware, plan.exchange_fraction)
        except UsageError:
            return
        data *= 2
