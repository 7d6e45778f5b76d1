"""One process as a process group of one, for benchmarks that train or evaluate models."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from biroute.configs.layout import resolve_layout
from biroute.configs.schema import RunConfig
from biroute.launcher.bench.several_processes import CPU, join_group
from biroute.model.attention.core import CoreAttention
from biroute.model.attention.rule import Router
from biroute.parallel.mesh.megatron import prepare_megatron
from biroute.parallel.mesh.mesh import Mesh, build_mesh

_folders: list[tempfile.TemporaryDirectory[str]] = []  # the process group reads its file until this process ends


def join_alone(config: RunConfig, device: torch.device = CPU) -> Mesh:
    """Make this process a process group of one, unless it already belongs to a group, and return its mesh.

    All variants use this mesh, because the threads of gloo's groups never end and would accumulate.
    """
    prepare_megatron(device)
    if not dist.is_initialized():
        _folders.append(tempfile.TemporaryDirectory(prefix="biroute-bench-"))
        join_group(0, 1, Path(_folders[-1].name), config.train, device)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed wants it, also of a group that somebody else has begun
    return build_mesh(resolve_layout(config, 1))


def set_router(module: nn.Module, router: Router) -> None:
    """Set the router of all layers that route."""
    for core in module.modules():
        if isinstance(core, CoreAttention) and core.rule is not None:
            core.rule = replace(core.rule, router=router)
