"""Private names of libraries that BiRoute reaches into: all of them, and that the installed versions have them."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("configs", "data_pipeline", "launcher", "model", "parallel", "slurm")


def pipeline_module(name: str) -> bool:
    from deepspeed.pipe import PipelineModule

    return f"self.{name} =" in inspect.getsource(PipelineModule) or hasattr(PipelineModule, name)


def zero_1_and_2(name: str) -> bool:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    return hasattr(DeepSpeedZeroOptimizer, name)


def zero_3(name: str) -> bool:
    from deepspeed.runtime.zero import stage3

    return hasattr(stage3.DeepSpeedZeroOptimizer_Stage3, name) or f".{name} = " in inspect.getsource(stage3)


def zero_norm(name: str) -> bool:
    """What all of DeepSpeed's optimizers keep the norm of a step in."""
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    return all(f"self.{name} = " in inspect.getsource(module) for module in (stage_1_and_2, stage3))


def pipeline_engine(name: str) -> bool:
    from deepspeed.runtime.pipe.engine import PipelineEngine

    return hasattr(PipelineEngine, name)


def deepspeed_operators(name: str) -> bool:
    import deepspeed

    return hasattr(deepspeed.ops, name)


def aten(name: str) -> bool:
    return hasattr(torch.ops.aten, name)


def mlflow_store(name: str) -> bool:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from mlflow.tracking import _tracking_service

    registry = _tracking_service.utils._tracking_store_registry
    return any(hasattr(one, name) for one in (SqlAlchemyStore, registry, _tracking_service.utils))


# Name -> whether the library still has it.
PRIVATE: dict[str, Callable[[str], bool]] = {
    "_local_start": pipeline_module,
    "_local_stop": pipeline_module,
    "_INSTRUCTION_MAP": pipeline_engine,
    "_synchronize_tied_weights": pipeline_module,
    "_global_grad_norm": zero_norm,
    "_lazy_init_hp_params_optimizer_state": zero_1_and_2,
    "_z3_optimizer": zero_3,
    "_get_param_partition_rank": zero_3,
    "__compatible_ops__": deepspeed_operators,
    "_foreach_mul_": lambda name: hasattr(torch, name),
    "_scaled_dot_product_flash_attention_for_cpu": aten,
    "_scaled_dot_product_flash_attention_for_cpu_backward": aten,
    "_engine_map": mlflow_store,
    "_tracking_store_registry": mlflow_store,
    "_get_store_with_resolved_uri": mlflow_store,
    "_tracking_service": lambda name: importlib.util.find_spec(f"mlflow.tracking.{name}") is not None,
    "_exit": lambda name: hasattr(os, name),
    "_current_frames": lambda name: hasattr(sys, name),
    "__unraisablehook__": lambda name: hasattr(sys, name),
}
PUBLIC = re.compile(r"__(name|doc|dict|file|version|context|cause|traceback)__")


def private_names(path: Path) -> Iterator[str]:
    """Names with a leading underscore that a module neither defines nor sets itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            own.add(node.attr)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and node.attr not in own:
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("__"):
            yield from (part for part in (node.module or "").split(".") if part.startswith("_"))
            yield from (name.name for name in node.names if name.name.startswith("_"))


def test_every_private_name_is_known() -> None:
    found = {name for room in ROOMS for path in (ROOT / room).rglob("*.py") for name in private_names(path)}
    assert {name for name in found if not PUBLIC.fullmatch(name)} == set(PRIVATE)


@pytest.mark.parametrize("name", PRIVATE)
def test_the_installed_library_has_it(name: str) -> None:
    assert PRIVATE[name](name), f"{name} has moved: see docs/versions.md"
