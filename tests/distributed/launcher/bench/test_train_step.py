"""Training steps of the speed benchmark, on the real engine: as many as asked, dense first, by the clock given."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from helpers.pool import WorkerPool

from biroute.configs.schema import AttentionConfig, ModelConfig
from biroute.launcher.bench.attention import train_step as bench_train_step
from biroute.launcher.bench.attention.train_step import StepVariant, measure_train_steps

VARIANTS = (
    StepVariant("dense", AttentionConfig(kind="dense")),
    StepVariant("routed", AttentionConfig(region_size=16, topk=2), dense_layers=(0,), target=2.0),
)
MODEL = ModelConfig(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, sequence_length=64)


def measure() -> tuple[list[dict[str, Any]], list[str]]:
    # A clock that moves on by itself: dense steps take 4 ticks, routed ones 1.
    ticks, kinds = itertools.count(), []
    step = bench_train_step._step

    def counted(engine: Any, batch: Any, now: Callable[[], float]) -> float:
        kinds.append(engine.config.model.attention.kind)
        before = [parameter.detach().clone() for _, parameter in engine.named_parameters()]
        seconds = step(engine, batch, now)
        after = [parameter for _, parameter in engine.named_parameters()]
        assert any((new != old).any() for new, old in zip(after, before, strict=True)), "a step trains"
        return seconds * (4 if kinds[-1] == "dense" else 1)

    bench_train_step._step = counted
    try:
        return measure_train_steps(lambda: float(next(ticks)), 2, MODEL, VARIANTS), kinds
    finally:
        bench_train_step._step = step


def test_steps_alternate_and_are_compared_with_dense(ranks: Callable[[int], WorkerPool]) -> None:
    ((rows, kinds),) = ranks(1).run(measure)
    assert kinds == ["dense", "bi_level"] * 3  # a warm-up and two repeats
    dense, routed = rows
    assert (dense["ratio"], routed["ratio"]) == (1.0, 4.0)
    assert routed["tokens_per_second"] == pytest.approx(64.0)
    assert (routed["dense_layers"], routed["target"]) == ([0], 2.0)
