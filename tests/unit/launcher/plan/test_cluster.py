"""What is said to make a run fit does so, when it is applied as it is printed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import yaml
from helpers.public_runs import profile

from biroute.configs.cluster_profile import ClusterProfile
from biroute.configs.errors import UsageError
from biroute.configs.layout import resolve_layout
from biroute.configs.load import config_from_tree
from biroute.configs.schema import RunConfig
from biroute.launcher.plan.cluster import fitting_change, plan_on_cluster, plan_with_profile
from biroute.launcher.plan.hardware import GIB
from biroute.launcher.plan.prediction import Plan, make_plan

TREE: dict[str, dict[str, Any]] = {
    "model": {"hidden_size": 2048, "num_layers": 8, "num_heads": 16, "num_kv_heads": 8, "sequence_length": 4096},
    "train": {"global_batch_size": 64, "microbatch_size": 1},
    "parallel": {"zero_stage": 1},
}


def config(words: Sequence[str] = (), **sections: dict[str, Any]) -> RunConfig:
    tree = {name: {**TREE.get(name, {}), **sections.get(name, {})} for name in {**TREE, **sections}}
    for word in words:
        name, value = word.split("=")
        section, field = name.split(".")
        tree.setdefault(section, {})[field] = yaml.safe_load(value)
    return config_from_tree(tree, "test")


def plan(run: RunConfig, gib: float) -> Plan:
    """On nodes of four devices with so much memory."""
    hardware = profile("h100").model_copy(update={"memory_gib": gib, "devices_per_node": 4})
    return make_plan(run, resolve_layout(run, 4 * run.slurm.nodes), hardware)


def peak(run: RunConfig) -> float:
    return plan(run, 1000).memory.total / GIB


ONE_HEAD = {"num_heads": 1, "num_kv_heads": 1, "num_layers": 5}  # which tensor ranks and stages cannot share


@pytest.mark.parametrize(
    ("words", "model"),
    [
        ("train.activation_checkpointing=true", {}),
        ("parallel.zero_stage=2", {"sequence_length": 64}),
        ("parallel.zero_stage=2 train.activation_checkpointing=true", {}),
        ("slurm.nodes=4 parallel.zero_stage=2 train.activation_checkpointing=true", ONE_HEAD),
    ],
)
def test_the_change_that_is_named_fits(words: str, model: dict[str, int]) -> None:
    run, changed = config(model=model), config(words.split(), model=model)
    short = plan(run, 1.0001 * peak(changed))
    assert not short.fits
    assert plan(changed, short.hardware.memory_gib).fits

    assert fitting_change(short) == words


def test_a_change_of_axes_frees_the_data_axis() -> None:
    """With parallel.data given, twice the tensor ranks would need twice the processes."""
    run = config(parallel={"data": 4, "zero_stage": 3}, train={"activation_checkpointing": True})
    short = plan(run, 0.8 * peak(run))
    found = fitting_change(short)
    assert found is not None and found.endswith("parallel.data=null")
    again = config([*found.split()], parallel={"zero_stage": 3}, train={"activation_checkpointing": True})
    assert plan(again, short.hardware.memory_gib).fits


def test_where_no_single_change_helps_all_layouts_are_tried_on_more_nodes() -> None:
    run = config(model={"num_layers": 32, "num_heads": 16}, train={"activation_checkpointing": True})
    short = plan(run, 0.07 * peak(run))
    found = fitting_change(short)
    assert found is not None and "slurm.nodes=" in found and "parallel.tensor=" in found, found
    again = config([*found.split()], model={"num_layers": 32}, train={"activation_checkpointing": True})
    assert plan(again, short.hardware.memory_gib).fits


def test_nothing_is_named_where_nothing_fits() -> None:
    assert fitting_change(plan(config(), 0.001)) is None


def test_the_ranks_of_a_node_are_its_devices() -> None:
    run = config(slurm={"nodes": 2})
    cluster = ClusterProfile(hardware="h100")
    found = plan_with_profile(run, resolve_layout(run, 8), cluster, 4)
    assert found is not None and found.hardware.devices_per_node == 4
    assert found.hardware.crosses_nodes(8, 1) and not found.hardware.crosses_nodes(4, 1)
    with pytest.raises(UsageError, match="h100: its nodes have 8 devices, but 16 ranks run on a node"):
        plan_with_profile(run, resolve_layout(run, 32), cluster, 16)


def test_without_a_hardware_profile_there_is_no_plan() -> None:
    assert plan_with_profile(config(), resolve_layout(config(), 4), ClusterProfile(), 4) is None
    assert plan_on_cluster(config(), resolve_layout(config(), 4)) is None
