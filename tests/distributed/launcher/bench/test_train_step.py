"""Training steps of the speed benchmark, on the real engine: as many as asked, dense first, compared with dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers.pool import WorkerPool
from torch.utils.flop_counter import FlopCounterMode

from biroute.configs.schema import AttentionConfig, ModelConfig
from biroute.launcher.bench.attention import train_step as bench_train_step
from biroute.launcher.bench.attention.train_step import StepVariant, measure_train_steps

VARIANTS = (
    StepVariant("dense", AttentionConfig(kind="dense")),
    StepVariant("routed", AttentionConfig(region_size=16, topk=2), dense_layers=(0,), target=2.0),
)
MODEL = ModelConfig(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, sequence_length=64)


def measure() -> tuple[list[dict[str, Any]], list[str]]:
    """Rows by a clock of operations instead of seconds: what is measured is the steps' real work, and repeats."""
    kinds = []
    step = bench_train_step._step

    def watched(engine: Any, batch: Any, now: Callable[[], float]) -> float:
        kinds.append(engine.config.model.attention.kind)
        before = [parameter.detach().clone() for _, parameter in engine.named_parameters()]
        operations = step(engine, batch, now)
        after = [parameter for _, parameter in engine.named_parameters()]
        assert any((new != old).any() for new, old in zip(after, before, strict=True)), "a step trains"
        return operations

    bench_train_step._step = watched
    try:
        with FlopCounterMode(display=False) as counter:
            return measure_train_steps(lambda: float(counter.get_total_flops()), 2, MODEL, VARIANTS), kinds
    finally:
        bench_train_step._step = step


def test_steps_alternate_and_are_compared_with_dense(ranks: Callable[[int], WorkerPool]) -> None:
    ((rows, kinds),) = ranks(1).run(measure)
    assert kinds == ["dense", "bi_level"] * 3  # a warm-up and two repeats
    dense, routed = rows
    assert dense["ratio"] == 1.0
    assert routed["ratio"] == pytest.approx(dense["seconds"] / routed["seconds"])
    # 6 operations a weight and token, forward and backward; torch counts no flash attention on the CPU.
    weights = 2 * (32 * 64 + 32 * 32 + 3 * 32 * MODEL.ffn_hidden_size) + 32 * 2048
    assert dense["seconds"] == 6 * 64 * weights
    assert routed["tokens_per_second"] == pytest.approx(64 / routed["seconds"])
    assert (routed["dense_layers"], routed["target"]) == ([0], 2.0)
