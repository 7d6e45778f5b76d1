"""Every layout trains as plain torch does in one process: losses, gradients, parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from helpers.pool import WorkerPool
from helpers.training import (
    Shards,
    merge,
    microbatches,
    plain_torch_run,
    shards_of,
    small_config,
    start_engine,
    train,
)

Ranks = Callable[[int], WorkerPool]
STEPS = 3
LAYOUTS = [
    {"tensor": tensor, "pipeline": pipeline, "data": data, "zero_stage": stage}
    for tensor, pipeline, data, stage in product((1, 2), (1, 2), (1, 2), (0, 1, 2, 3))
    if tensor * pipeline * data <= 4 and not (pipeline > 1 and stage > 1)
]
MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied, normed": {"tied_embeddings": False, "qk_norm": True},
    "mlm": {"objective": "mlm"},
    "keys not smeared, two descriptors": {
        "key_smear": False,
        "attention": {"region_size": 4, "topk": 3, "descriptors_per_region": 2},
    },
}


def name_of(layout: dict[str, int]) -> str:
    return " ".join(f"{axis}{size}" for axis, size in layout.items())


def layout_job(layout: dict[str, int], model: dict[str, Any]) -> tuple[float, list[tuple[float, float]], Shards]:
    """Evaluate on the first step's sequences, then train; the loss, reports of all steps, weights after the last and
    the gradients that it used."""
    engine = start_engine(small_config(model=model, parallel=layout))
    evaluated = engine.evaluate(microbatches(engine.config, engine.mesh, 1))
    assert engine.traffic is None or not engine.traffic.sent, "evaluation is part of no step"
    gradients: dict[str, torch.Tensor] = {}
    take_step = engine.deepspeed._take_model_step

    def record_then_step(*arguments: Any) -> Any:
        gradients.update({name: engine.state.gradient(p) for name, p in engine.named_parameters()})
        return take_step(*arguments)

    engine.deepspeed._take_model_step = record_then_step
    reports = train(engine, range(1, STEPS + 1))
    values = {
        name: {"weight": engine.state.read(p)["weight"], "gradient": gradients[name]}
        for name, p in engine.named_parameters()
    }
    return evaluated, reports, shards_of(engine, values)


def reference_job(model: dict[str, Any]) -> Any:
    return plain_torch_run(small_config(model=model), STEPS)


@pytest.fixture(scope="module")
def references(ranks: Ranks) -> dict[str, Any]:
    return {name: ranks(1).run(reference_job, model)[0] for name, model in MODELS.items()}


REGION_LAYOUTS = [
    {"region": 2, "zero_stage": 0},
    {"region": 4, "zero_stage": 1},
    {"region": 2, "tensor": 2, "zero_stage": 1},
    {"region": 2, "pipeline": 2, "zero_stage": 1},
    {"region": 2, "data": 2, "zero_stage": 2},
    {"region": 2, "data": 2, "zero_stage": 3},
]

SEQUENCE_PARALLEL_LAYOUTS = [
    {**layout, "tensor": 2, "sequence_parallel": True}
    for layout in (
        {"zero_stage": 0},
        {"pipeline": 2, "zero_stage": 1},
        {"region": 2, "zero_stage": 1},
        {"data": 2, "zero_stage": 1},
        {"data": 2, "zero_stage": 2},
        {"region": 2, "zero_stage": 3},
    )
]


def check(layout: dict[str, int], model: str, ranks: Ranks, references: dict[str, Any]) -> None:
    world_size = math.prod(layout.get(axis, 1) for axis in ("tensor", "pipeline", "region", "data"))
    answers = ranks(world_size).run(layout_job, layout, MODELS[model])
    expected_reports, expected = references[model]
    for evaluated, reports, _ in answers:
        assert evaluated == pytest.approx(expected_reports[0][0], rel=1e-5)
        torch.testing.assert_close(torch.tensor(reports), torch.tensor(expected_reports), rtol=1e-5, atol=0)
    found = merge([shards for *_, shards in answers])
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        for kind, want in values.items():
            error = (found[name][kind] - want).norm() / want.norm()
            assert error < 1e-5, f"{name} {kind}: relative error {error:.1e}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_layout_equals_plain_torch(layout: dict[str, int], ranks: Ranks, references: dict[str, Any]) -> None:
    check(layout, "tied", ranks, references)


@pytest.mark.parametrize("layout", REGION_LAYOUTS, ids=name_of)
def test_sharded_sequences_equal_plain_torch(
    layout: dict[str, int], ranks: Ranks, references: dict[str, Any]
) -> None:
    check(layout, "tied", ranks, references)


@pytest.mark.parametrize("layout", SEQUENCE_PARALLEL_LAYOUTS, ids=name_of)
def test_sequence_parallel_equals_plain_torch(
    layout: dict[str, int], ranks: Ranks, references: dict[str, Any]
) -> None:
    check(layout, "tied", ranks, references)


@pytest.mark.parametrize("model", [name for name in MODELS if name != "tied"])
@pytest.mark.parametrize(
    "layout",
    [
        {"region": 2, "tensor": 2, "zero_stage": 1},
        {"region": 4, "zero_stage": 3},
        {"region": 2, "tensor": 2, "zero_stage": 1, "sequence_parallel": True},
        {"tensor": 2, "pipeline": 2, "zero_stage": 1, "sequence_parallel": True},
        {"tensor": 2, "pipeline": 2, "data": 1, "zero_stage": 1},
        {"tensor": 2, "pipeline": 1, "data": 2, "zero_stage": 3},
        {"tensor": 1, "pipeline": 2, "data": 2, "zero_stage": 0},
    ],
    ids=name_of,
)
def test_other_models(layout: dict[str, int], model: str, ranks: Ranks, references: dict[str, Any]) -> None:
    check(layout, model, ranks, references)
