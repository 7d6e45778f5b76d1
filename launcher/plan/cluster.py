"""The plan of a run on the nodes of its cluster profile, and what would make it fit there. No torch."""

from __future__ import annotations

from typing import Any

from biroute.configs.cluster_profile import ClusterProfile, load_profile
from biroute.configs.errors import UsageError
from biroute.configs.layout import Layout, resolve_layout
from biroute.configs.schema import RunConfig
from biroute.launcher.plan.hardware import load_hardware
from biroute.launcher.plan.prediction import Plan, make_plan
from biroute.launcher.plan.search import changed_config, remedy, search_layouts

_MOST_NODES = 4096
MOST_RANKS_SEARCHED = 64  # all layouts of so many ranks take seconds


def plan_on_cluster(config: RunConfig, layout: Layout) -> Plan | None:
    """Plan a run on the nodes that its cluster profile describes; None if it names no hardware profile.

    Raises:
        UsageError: one of the profiles is not usable.
    """
    if not config.slurm.profile:
        return None
    ranks_per_node = config.slurm.ranks_per_node or max(1, layout.world_size // config.slurm.nodes)
    return plan_with_profile(config, layout, load_profile(config.slurm.profile), ranks_per_node)


def plan_with_profile(config: RunConfig, layout: Layout, profile: ClusterProfile, ranks_per_node: int) -> Plan | None:
    """Plan a run with `ranks_per_node` devices of each node; None if the cluster profile names no hardware profile.

    Raises:
        UsageError: the hardware profile is not usable, or its nodes have fewer devices than ranks.
    """
    if profile.hardware is None:
        return None
    field = "hardware of the cluster profile: "
    hardware = load_hardware(profile.hardware, field)
    if ranks_per_node > hardware.devices_per_node:
        raise UsageError(
            f"{field}{profile.hardware}: its nodes have {hardware.devices_per_node} devices, but "
            f"{ranks_per_node} ranks run on a node; name the profile of these nodes, or set slurm.ranks_per_node"
        )
    # The links between nodes carry what ranks of different nodes send, however many devices a node has.
    return make_plan(config, layout, hardware.model_copy(update={"devices_per_node": ranks_per_node}))


def fitting_change(plan: Plan) -> str | None:
    """Return what makes a plan fit that does not, as overrides of `biroute submit`; None if nothing was found.

    Tried in this order: ZeRO stages and activation checkpointing on the same nodes; one other change there; the first
    two on more nodes; every layout of nodes that have few ranks together.
    """
    ranks, per_node = plan.layout.world_size, plan.hardware.devices_per_node
    nodes = first = max(1, ranks // per_node)
    if (found := _with_less_per_rank(plan, nodes) or remedy(plan)) is not None:
        return found
    while nodes < _MOST_NODES:
        nodes *= 2
        if (found := _with_less_per_rank(plan, nodes)) is not None:
            return found
    nodes = first
    while nodes * per_node <= MOST_RANKS_SEARCHED:
        if (found := _another_layout(plan, nodes)) is not None:
            return found
        nodes *= 2
    return None


def _with_less_per_rank(plan: Plan, nodes: int) -> str | None:
    """Try higher ZeRO stages and activation checkpointing on so many nodes."""
    config, ranks = plan.config, nodes * plan.hardware.devices_per_node
    more = [f"slurm.nodes={nodes}", *(["parallel.data=null"] if config.parallel.data else [])]
    for zero in range(plan.layout.zero_stage, 4):
        for recompute in (False, True) if not _recomputes(config) else (True,):
            words = list(more) if ranks != plan.layout.world_size else []
            words += [f"parallel.zero_stage={zero}"] if zero != plan.layout.zero_stage else []
            words += ["train.activation_checkpointing=true"] if recompute != _recomputes(config) else []
            parallel, train = {"data": None, "zero_stage": zero}, {"activation_checkpointing": recompute}
            try:
                changed = changed_config(config, parallel, train)
                layout = resolve_layout(changed, ranks)
            except UsageError:
                continue
            if make_plan(changed, layout, plan.hardware, plan.exchange_fraction).fits:
                return " ".join(words)
    return None


def _recomputes(config: RunConfig) -> bool:
    return config.train.activation_checkpointing


def _another_layout(plan: Plan, nodes: int) -> str | None:
    """Return the fastest layout of so many nodes that fits."""
    config, ranks = plan.config, nodes * plan.hardware.devices_per_node
    try:
        found = search_layouts(config, ranks, plan.hardware, plan.exchange_fraction).plans
    except UsageError:
        return None
    if not found:
        return None
    best = found[0]
    wanted: dict[str, Any] = {
        name: getattr(best.config.parallel, name)
        for name in ("tensor", "region", "pipeline", "zero_stage", "sequence_parallel")
        if getattr(best.config.parallel, name) != getattr(config.parallel, name)
    }
    words = [f"slurm.nodes={nodes}"] if ranks != plan.layout.world_size else []
    words += [f"parallel.{name}={str(value).lower()}" for name, value in wanted.items()]
    words += ["parallel.data=null"] if config.parallel.data else []
    words += ["train.activation_checkpointing=true"] if _recomputes(best.config) and not _recomputes(config) else []
    return " ".join(words)
