"""The start of a model: one layer at a time on the host, and nothing drawn that a checkpoint overwrites."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from helpers.pool import WorkerPool
from helpers.training import small_config
from torch import nn

from biroute.configs.layout import resolve_layout
from biroute.model.language_model import LayerPlan, LayerSequence, plan_layers
from biroute.parallel.engine.deepspeed_setup import pipeline_specs
from biroute.parallel.mesh.mesh import build_mesh

Ranks = Callable[[int], WorkerPool]
META = torch.device("meta")  # stands for a GPU: what is moved there leaves the host's memory


def host_bytes() -> int:
    """Bytes of all parameters that are alive on the host."""
    gc.collect()
    found = [p for p in gc.get_objects() if isinstance(p, nn.Parameter) and p.device.type == "cpu"]
    return sum(p.nbytes for p in found)


@dataclass(frozen=True)
class WatchedPlan(LayerPlan):
    """A planned layer that records what the host holds when it begins to be built."""

    def build(self) -> nn.Module:
        held.append(host_bytes())
        return super().build()


held: list[int] = []


def start_job(pipeline: bool) -> list[int]:
    """Build a model on another device; returns what the host held before each layer, less than before the first."""
    config = small_config(model={"tied_embeddings": False})
    groups = build_mesh(resolve_layout(config, 1)).groups
    plans: list[LayerPlan] = [WatchedPlan(**vars(plan)) for plan in plan_layers(config, groups)]
    held.clear()
    if pipeline:
        modules = nn.ModuleList([spec.build() for spec in pipeline_specs(plans, META)])
    else:
        modules = LayerSequence(plans, META).layers
    assert all(p.device == META for p in modules.parameters())
    assert len(held) == len(plans)
    return [value - held[0] for value in held]


@pytest.mark.parametrize("pipeline", [False, True])
def test_the_host_holds_one_layer_at_a_time(pipeline: bool, ranks: Ranks) -> None:
    (growth,) = ranks(1).run(start_job, pipeline)
    assert set(growth) == {0}


def undrawn_job() -> tuple[dict[str, bool], bool]:
    """Whether each matrix of a model to be loaded is NaN throughout, and whether no random number was drawn."""
    config = small_config(model={"tied_embeddings": False})
    groups = build_mesh(resolve_layout(config, 1)).groups
    plans = plan_layers(config, groups, draw_weights=False)
    before = torch.get_rng_state()
    layers = [plan.module_class(**plan.arguments) for plan in plans]  # `build` would hide what is drawn
    same = torch.equal(before, torch.get_rng_state())
    names = {
        f"{plan.name}.{name}": p for plan, x in zip(plans, layers, strict=True) for name, p in x.named_parameters()
    }
    return {name: bool(p.isnan().all()) for name, p in names.items() if p.dim() > 1}, same


def test_what_is_to_be_loaded_is_not_drawn(ranks: Ranks) -> None:
    ((undrawn, same),) = ranks(1).run(undrawn_job)
    assert len(undrawn) == 2 + 4 * 4, "embedding, head, and four matrices of each block"
    assert all(undrawn.values())
    assert same
