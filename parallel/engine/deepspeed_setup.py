"""DeepSpeed's own terms, all derived from ours: settings, pipeline layers, and the answers about the mesh."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import nn

from biroute.configs.layout import microbatches_per_step
from biroute.configs.schema import RunConfig
from biroute.model.language_model import LayerPlan
from biroute.parallel.mesh.mesh import Mesh


def start() -> None:
    """Let DeepSpeed adopt the process group that torch already has."""
    log = logging.getLogger("DeepSpeed")
    log.setLevel(logging.WARNING)
    log.addFilter(_is_news)
    # A C++ extension for inference on CPU, which it would compile here: 20 s and a compiler for nothing.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with quietly():
        deepspeed.init_distributed(auto_mpi_discovery=False)


def _is_news(record: logging.LogRecord) -> bool:
    """Drop DeepSpeed's word on a skipped step: the trainer names the step and its sequences."""
    return "OVERFLOW! Skipping step" not in record.getMessage()


def start_engine(config: RunConfig, mesh: Mesh, module: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """DeepSpeed's engine around `module`. Collective."""
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config=deepspeed_settings(config, mesh),
        # A pipeline module brings its own topology; DeepSpeed must get no other then.
        mpu=None if mesh.layout.pipe > 1 else _MeshForDeepSpeed(mesh),
        dist_init_required=False,
    )
    return engine


@contextmanager
def quietly() -> Iterator[None]:
    """Keep what DeepSpeed prints while it starts; show it only if it fails."""
    kept = io.StringIO()
    try:
        with redirect_stdout(kept):
            yield
    except BaseException:
        sys.stderr.write(kept.getvalue())
        raise


def deepspeed_settings(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
    """DeepSpeed's configuration, all of it derived from ours."""
    stage = config.parallel.zero_stage
    return {
        "train_micro_batch_size_per_gpu": config.train.microbatch_size,
        "gradient_accumulation_steps": microbatches_per_step(config, mesh.layout),
        "gradient_clipping": config.optim.gradient_clip if stage > 0 else 0.0,  # stage 0: Engine._clip_gradients
        "zero_optimization": {"stage": stage, "overlap_comm": stage == 3 or config.parallel.overlap_grad_reduce},
        "zero_allow_untested_optimizer": True,
        # immediate: a bf16 gradient goes as soon as it is added to the fp32 one, rather than after the step.
        "bf16": {"enabled": config.train.precision == "bf16", "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",  # DeepSpeed's default would sum over data ranks in bf16
        "steps_per_print": None,
        # Megatron-core's tensor ranks hold whole activations; DeepSpeed must not cut them up between stages.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }


def partitioned_construction(config: RunConfig, mesh: Mesh) -> AbstractContextManager[Any]:
    """ZeRO-3: partition each layer as soon as it is built, so that no rank ever holds the whole model."""
    if config.parallel.zero_stage < 3:
        return nullcontext()
    return deepspeed.zero.Init(
        data_parallel_group=mesh.groups.dp_cp, config_dict_or_path=deepspeed_settings(config, mesh)
    )


def pipeline_specs(plans: list[LayerPlan], device: torch.device) -> list[LayerSpec]:
    """Describe the layers to DeepSpeed, which builds those of its stage, each on `device` before the next one."""
    names = [plan.name for plan in plans]
    return [(_TiedSpec if names.count(plan.name) > 1 else _Spec)(plan, device) for plan in plans]


class _Spec(LayerSpec):
    """A planned layer that DeepSpeed builds on the stage that it falls to."""

    def __init__(self, plan: LayerPlan, device: torch.device) -> None:
        super().__init__(plan.module_class)
        self.plan, self.device = plan, device

    def build(self, log: bool = False) -> nn.Module:
        return self.plan.build().to(self.device)


class _TiedSpec(TiedLayerSpec):
    """A planned layer that several stages use; DeepSpeed keeps its copies equal."""

    def __init__(self, plan: LayerPlan, device: torch.device) -> None:
        super().__init__(plan.name, plan.module_class)
        self.plan, self.device = plan, device

    def build(self, log: bool = False) -> nn.Module:
        return self.plan.build().to(self.device)


class _MeshForDeepSpeed:
    """The questions that DeepSpeed asks about parallelism, answered from the mesh. Region ranks count as data."""

    def __init__(self, mesh: Mesh) -> None:
        self._tensor, self._data = mesh.groups.tp, mesh.groups.dp_cp

    def get_tensor_model_parallel_rank(self) -> int:
        return self._tensor.rank()

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._tensor.size()

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tensor

    def get_tensor_model_parallel_src_rank(self) -> int:
        return dist.get_global_rank(self._tensor, 0)

    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size
    get_model_parallel_group = get_tensor_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self._data.rank()

    def get_data_parallel_world_size(self) -> int:
        return self._data.size()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data
