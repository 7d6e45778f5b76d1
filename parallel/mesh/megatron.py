"""The one place that makes Megatron-core run without CUDA, and that starts its process groups."""

from __future__ import annotations

import math
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from biroute.configs.layout import Layout

# Fastest axis first; "cp" is our region axis, "ep" has one rank.
MEGATRON_ORDER = "tp-cp-ep-dp-pp"
_CPU = torch.device("cpu")


def prepare_megatron(device: torch.device) -> None:
    """Let Megatron-core build its layers on `device`.

    Without CUDA it still asks `torch.cuda.current_device()` where buffers go; the answer "cpu" is all it needs.
    """
    if device.type == "cpu":
        torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]


def start_process_groups(layout: Layout, timeout: timedelta) -> ProcessGroupCollection:
    """Create Megatron-core's process groups for `layout`, each with that timeout. Collective over all ranks.

    Its context-parallel axis is our region axis; ranks count in the order tensor, region, data, pipe.
    """
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipe,
        context_parallel_size=layout.region,
        order=MEGATRON_ORDER,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=math.ceil(timeout.total_seconds() / 60),
    )
    return ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp", "pp", "dp", "dp_cp"])


@cache
def groups_of_one(device: torch.device) -> ProcessGroupCollection:
    """Return the process groups of a whole model in this process alone; it needs no launcher, port or file.

    Megatron-core's layers ask their groups for sizes and ranks; with one rank nothing is ever sent. They are made
    once, since torch never ends the threads of a group.
    """
    prepare_megatron(device)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return start_process_groups(Layout(tensor=1, region=1, data=1, pipe=1, zero_stage=0), timedelta(minutes=30))


def stop_process_groups() -> None:
    """Forget Megatron-core's process groups, so that another layout can be started in this process."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
