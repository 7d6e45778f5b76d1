"""The same run on more nodes, by more data ranks. No torch.

Weak scaling keeps the sequences of each data rank, so the batch grows with the nodes; strong scaling keeps the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from biroute.configs.errors import UsageError
from biroute.configs.layout import resolve_layout
from biroute.launcher.plan.prediction import Plan, make_plan
from biroute.launcher.plan.search import changed_config

MOST_NODES = 4096


def scaled(plan: Plan, mode: Literal["weak", "strong"], most_nodes: int = MOST_NODES) -> Iterator[tuple[int, Plan]]:
    """Yield (devices, plan), from the plan itself on with twice the data ranks each time.

    It ends at `most_nodes` nodes, or where the layout check refuses: a strong one, when the batch is used up.
    """
    layout, train = plan.layout, plan.config.train
    data = layout.data
    while True:
        devices = layout.world_size // layout.data * data
        if devices > most_nodes * plan.hardware.devices_per_node:
            return
        batch = train.global_batch_size // layout.data * data if mode == "weak" else train.global_batch_size
        try:
            config = changed_config(
                plan.config, {"data": data}, {"global_batch_size": batch, "evaluate_sequences": None}
            )
            yield devices, make_plan(config, resolve_layout(config, devices), plan.hardware, plan.exchange_fraction)
        except UsageError:
            return
        data *= 2
