"""What train.precision=bf16 means in each engine: gradients near those of fp32, and accumulated in fp32."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from helpers.pool import WorkerPool
from helpers.training import small_config, start_engine, tokens_of_step
from torch import Tensor

from biroute.parallel.engine.engine import Microbatch

Ranks = Callable[[int], WorkerPool]
LAYOUTS: dict[str, dict[str, Any]] = {
    "ZeRO 1": {"data": 1, "zero_stage": 1},
    "ZeRO 2": {"data": 1, "zero_stage": 2},
    "ZeRO 3": {"data": 1, "zero_stage": 3},
    "pipeline": {"pipeline": 2, "data": 1, "zero_stage": 1},
    "region ranks": {"region": 2, "data": 1, "zero_stage": 1},
}


def gradients_job(parallel: dict[str, Any], precision: str, copies: int) -> dict[str, Tensor]:
    """The gradients of a step over `copies` times the same microbatch, as AdamW's first moments show them."""
    train = {"precision": precision, "microbatch_size": 2, "global_batch_size": 2 * copies}
    optim = {"gradient_clip": 0.0, "learning_rate": 1e-6, "min_learning_rate": 0.0}
    # Dense layers: rounded queries would choose other regions, which is no error of a sum.
    config = small_config(
        parallel=parallel, train=train, optim=optim, model={"dense_layers": [0, 1, 2, 3], "sliding_window_layers": []}
    )
    engine = start_engine(config)
    inputs, labels = (engine.mesh.own_tokens(x[:2]) for x in tokens_of_step(config, 1))
    engine.train_step([Microbatch(inputs, labels)] * copies, 1e-6)
    return {
        name: engine.state.read(parameter)["exp_avg"] / (1 - config.optim.beta1)
        for name, parameter in engine.named_parameters()
    }


@cache  # both tests look at some of them
def gradients(ranks: Ranks, layout: str, precision: str, copies: int = 1) -> dict[str, Tensor]:
    parallel = LAYOUTS[layout]
    world = parallel.get("pipeline", 1) * parallel.get("region", 1)
    found: dict[str, Tensor] = {}
    for one in ranks(world).run(gradients_job, parallel, precision, copies):
        found |= one
    return found


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of a parameter's gradient, in the 2-norm."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - x).norm() / x.norm()) for name, x in expected.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16_gradients_are_accumulated_in_fp32(ranks: Ranks, layout: str) -> None:
    """The mean of 32 equal gradients is that gradient to the bit of fp32; summed in bf16 it is off by thousandths."""
    one = gradients(ranks, layout, "bf16")
    many = gradients(ranks, layout, "bf16", copies=32)
    assert difference(many, one) < 1e-5


def test_bf16_gradients_are_near_those_of_fp32(ranks: Ranks) -> None:
    exact = gradients(ranks, "ZeRO 1", "fp32")
    for layout in LAYOUTS:
        found = difference(gradients(ranks, layout, "bf16"), exact)
        assert 1e-4 < found < 0.05, (layout, found)


def gradient_bytes_job() -> tuple[int, int]:
    """Bytes of bf16 gradients when AdamW steps, and of the weights."""
    config = small_config(parallel=LAYOUTS["ZeRO 1"], train={"precision": "bf16", "microbatch_size": 8})
    engine = start_engine(config)
    parameters = [parameter for _, parameter in engine.named_parameters()]
    held: list[int] = []
    engine._adam.register_step_pre_hook(
        lambda *_: held.append(sum(0 if x.grad is None else x.grad.nbytes for x in parameters))
    )
    engine.train_step([Microbatch(*tokens_of_step(config, 1))], 1e-3)
    return held[0], sum(x.nbytes for x in parameters)


def test_bf16_gradients_are_gone_before_the_step(ranks: Ranks) -> None:
    """docs/gpu.md counts 6 bytes for a parameter that ZeRO 1 does not divide; with them it would be 8."""
    ((held, weights),) = ranks(1).run(gradient_bytes_job)
    assert weights > 0
    assert held == 0
