"""Every setting that an engine reads reaches the optimizer, the model and the mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.pool import WorkerPool
from helpers.training import plain_torch_run, small_config, start_engine, train
from torch import Tensor

from biroute.model.block import Block

Ranks = Callable[[int], WorkerPool]
Weights = dict[str, Tensor]
STEPS = 3
OPTIM: dict[str, float] = {"weight_decay": 3.0, "beta1": 0.5, "beta2": 0.5, "epsilon": 1e-2, "gradient_clip": 0.05}


def engine_job(optim: dict[str, float], zero_stage: int) -> Weights:
    engine = start_engine(small_config(optim=optim, parallel={"data": 1, "zero_stage": zero_stage}))
    train(engine, range(1, STEPS + 1))
    return {name: engine.state.read(parameter)["weight"].clone() for name, parameter in engine.named_parameters()}


def torch_job(optim: dict[str, float]) -> Weights:
    """The same with torch's AdamW and its clipping."""
    return {name: found["weight"] for name, found in plain_torch_run(small_config(optim=optim), STEPS)[1].items()}


def distance(found: Weights, expected: Weights) -> float:
    """The largest relative difference of a weight, in the 2-norm."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - x).norm() / x.norm()) for name, x in expected.items())


@pytest.mark.parametrize("zero_stage", [0, 1])
@pytest.mark.parametrize("field", OPTIM)
def test_a_setting_of_adamw_arrives(ranks: Ranks, field: str, zero_stage: int) -> None:
    pool = ranks(1)
    (found,), (expected,) = (
        pool.run(engine_job, {field: OPTIM[field]}, zero_stage),
        pool.run(torch_job, {field: OPTIM[field]}),
    )
    (base,) = pool.run(torch_job, {})
    assert distance(found, expected) < 1e-5
    assert distance(found, base) > 1e-3


def seeded_job(seed: int) -> Weights:
    engine = start_engine(small_config(train={"seed": seed}, parallel={"data": 1}))
    return {name: parameter.detach().clone() for name, parameter in engine.named_parameters() if parameter.dim() > 1}


def test_the_seed_draws_the_weights(ranks: Ranks) -> None:
    pool = ranks(1)
    first, again, other = (pool.run(seeded_job, seed)[0] for seed in (3, 3, 4))
    for name, weight in first.items():
        assert torch.equal(weight, again[name]), name
        assert not torch.equal(weight, other[name]), name


def passes_job(recompute: bool, microbatch_size: int) -> tuple[int, int]:
    """Passes through the attention of layer 0 in one step, and sequences in each."""
    config = small_config(
        train={"activation_checkpointing": recompute, "microbatch_size": microbatch_size}, parallel={"data": 1}
    )
    engine = start_engine(config)
    core = engine.deepspeed.module.layers[1].layer.self_attention.core_attention
    sizes: list[int] = []
    core.on_route = lambda _, route: sizes.append(len(route))
    train(engine, [1])
    return len(sizes), sizes[0]


def test_blocks_are_recomputed_and_microbatches_have_their_size(ranks: Ranks) -> None:
    """8 sequences a step: 4 microbatches of 2, each with a second pass in the backward."""
    pool = ranks(1)
    assert pool.run(passes_job, False, 2) == [(4, 2)]
    assert pool.run(passes_job, True, 2) == [(8, 2)]
    assert pool.run(passes_job, False, 4) == [(2, 4)]


def layout_job(parallel: dict[str, Any]) -> dict[str, int]:
    """What a layout of two ranks makes of rank 0."""
    engine = start_engine(small_config(parallel=parallel))
    blocks = [module for module in engine.deepspeed.module.modules() if isinstance(module, Block)]
    tokens: list[int] = []
    blocks[0].register_forward_hook(lambda _, __, hidden: tokens.append(len(hidden)))
    train(engine, [1])
    moments = sum(state["exp_avg"].numel() for state in engine.deepspeed.optimizer.state.values())
    return {
        "columns of a matrix": blocks[0].layer.self_attention.linear_proj.weight.shape[-1],
        "blocks": len(blocks),
        "tokens of a hidden state": tokens[0],
        "thousands of moments": round(moments / 1000),
        "stage": engine.deepspeed.zero_optimization_stage(),
    }


DATA_PARALLEL = {
    "columns of a matrix": 32, "blocks": 4, "tokens of a hidden state": 32, "thousands of moments": 74, "stage": 0,
}  # fmt: skip
TWO_RANKS: list[tuple[dict[str, Any], dict[str, int]]] = [
    ({}, {}),
    ({"tensor": 2}, {"columns of a matrix": 16, "thousands of moments": 37}),
    (
        {"tensor": 2, "sequence_parallel": True},
        {"columns of a matrix": 16, "thousands of moments": 37, "tokens of a hidden state": 16},
    ),
    ({"pipeline": 2}, {"blocks": 2, "thousands of moments": 43}),
    ({"region": 2}, {"tokens of a hidden state": 16}),
    ({"zero_stage": 1}, {"stage": 1, "thousands of moments": 37}),
    ({"zero_stage": 2}, {"stage": 2, "thousands of moments": 37}),
    ({"zero_stage": 3}, {"stage": 3, "thousands of moments": 37}),
]


@pytest.mark.parametrize(("parallel", "changed"), TWO_RANKS, ids=str)
def test_a_layout_is_what_was_asked_for(ranks: Ranks, parallel: dict[str, Any], changed: dict[str, int]) -> None:
    found = ranks(2).run(layout_job, {"zero_stage": 0, **parallel})[0]
    assert found == DATA_PARALLEL | changed


def overlap_job(overlap: bool) -> tuple[Weights, bool]:
    engine = start_engine(small_config(parallel={"data": 2, "zero_stage": 2, "overlap_grad_reduce": overlap}))
    train(engine, range(1, STEPS + 1))
    weights = {name: engine.state.read(parameter)["weight"] for name, parameter in engine.named_parameters()}
    return weights, engine.deepspeed.zero_overlap_comm()


def test_gradients_that_are_summed_beside_backward_are_the_same(ranks: Ranks) -> None:
    """That they are summed on another stream shows on a GPU alone; here DeepSpeed's other order of buffers does."""
    pool = ranks(2)
    (beside, overlaps), (after, waits) = pool.run(overlap_job, True)[0], pool.run(overlap_job, False)[0]
    assert overlaps and not waits
    for name, weight in after.items():
        assert torch.equal(beside[name], weight), name
