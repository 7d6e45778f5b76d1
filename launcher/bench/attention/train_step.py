"""Part of `biroute bench attention`: tokens per second of whole training steps, routed compared with dense.

It uses the real model and engine: embedding, blocks, head, loss, backward, clipping, AdamW. The variants alternate.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from biroute.configs.data_section import DataConfig, TokenizerConfig
from biroute.configs.layout import resolve_layout
from biroute.configs.schema import AttentionConfig, ModelConfig, RunConfig, TrainConfig
from biroute.launcher.bench.report import say
from biroute.launcher.bench.several_processes import CPU
from biroute.launcher.bench.single_process import join_alone
from biroute.parallel.engine.engine import Engine, Microbatch, build_engine
from biroute.parallel.mesh.mesh import build_mesh


@dataclass(frozen=True)
class StepVariant:
    """A kind of attention for the layers of a model; `target` is the speed-up over dense to reach."""

    name: str
    attention: AttentionConfig
    dense_layers: tuple[int, ...] = ()
    target: float | None = None


PER_REGION = AttentionConfig(region_size=64, query_block_size=64, topk=8, descriptors_per_region=1)
PER_TOKEN = AttentionConfig(region_size=64, query_block_size=1, topk=8, descriptors_per_region=1)
EIGHT_DESCRIPTORS = PER_TOKEN.model_copy(update={"descriptors_per_region": 8})
STEP_VARIANTS = (
    StepVariant("dense", AttentionConfig(kind="dense")),
    StepVariant("one route per region, first layer dense", PER_REGION, (0,), target=2.0),
    StepVariant("one route per token, first layer dense", PER_TOKEN, (0,)),
    StepVariant("one route per token", PER_TOKEN),
    StepVariant("one route per token, 8 descriptors", EIGHT_DESCRIPTORS),
)
# 8 heads of 32 in 2 groups; the vocabulary is that of configs/demo.yaml.
STEP_MODEL = ModelConfig(hidden_size=256, num_layers=4, num_heads=8, num_kv_heads=2, sequence_length=8192)
STEP_VOCABULARY = 2048
STEP_TRAIN = TrainConfig(global_batch_size=1, microbatch_size=1)


def measure_train_steps(
    now: Callable[[], float],
    repeats: int,
    model: ModelConfig = STEP_MODEL,
    variants: Sequence[StepVariant] = STEP_VARIANTS,
    train: TrainConfig = STEP_TRAIN,
    device: torch.device = CPU,
    vocabulary: int = STEP_VOCABULARY,
) -> list[dict[str, Any]]:
    """Measure training steps over one sequence.

    Args:
        now: a clock in seconds.
        repeats: steps of each variant, after one for warm-up.
        model: the model, whose attention the variants change.
        variants: the variants; the first one is the baseline.
        train: batch, precision and the like.
        device: where it trains.
        vocabulary: words.

    Returns:
        A row for each variant.
    """
    configs = [_config(model, variant, train, vocabulary) for variant in variants]
    join_alone(configs[0], device)
    engines = [build_engine(config, build_mesh(resolve_layout(config, 1)), device) for config in configs]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (1, model.sequence_length + 1), generator=generator).to(device)
    batch = Microbatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    rounds = [[_step(engine, batch, now) for engine in engines] for _ in range(repeats + 1)]
    medians = [statistics.median(column) for column in zip(*rounds[1:], strict=True)]  # the first round warms up
    rows = [_row(model, variant, median, medians[0]) for variant, median in zip(variants, medians, strict=True)]
    say("; ".join(f"train step, {row['name']} {row['seconds']:.3f} s {row['ratio']:.2f}x" for row in rows))
    return rows


def _config(model: ModelConfig, variant: StepVariant, train: TrainConfig, vocabulary: int) -> RunConfig:
    attention = {"attention": variant.attention, "dense_layers": variant.dense_layers}
    return RunConfig(
        model=model.model_copy(update=attention),
        data=DataConfig(tokenizer=TokenizerConfig(vocab_size=vocabulary)),
        train=train,
    )


def _step(engine: Engine, batch: Microbatch, now: Callable[[], float]) -> float:
    started = now()
    engine.train_step([batch], learning_rate=1e-4)
    return now() - started


def _row(model: ModelConfig, variant: StepVariant, seconds: float, dense_seconds: float) -> dict[str, Any]:
    return {
        "name": variant.name,
        "num_tokens": model.sequence_length,
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "dense_layers": list(variant.dense_layers),
        **variant.attention.model_dump(include={"kind", "region_size", "topk", "query_block_size"}),
        "seconds": seconds,
        "tokens_per_second": model.sequence_length / seconds,
        "ratio": dense_seconds / seconds,
        "target": variant.target,
    }
