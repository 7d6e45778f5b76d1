"""`biroute bench quality`: held-out bits per byte of one model on real text with every kind of attention.

It uses the real model, engine and loader. All variants have equal data, steps and initial weights. Each variant is
scored as trained and, if it routes, also with the same weights under a random route.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from biroute.configs.errors import UsageError
from biroute.configs.schema import RunConfig
from biroute.data_pipeline.dataset import open_dataset
from biroute.data_pipeline.read.loader import Batch
from biroute.launcher.bench.quality.variants import VARIANTS, variant_config
from biroute.launcher.bench.report import each, environment_info, mean, say, select
from biroute.launcher.bench.rows import KeptRows
from biroute.launcher.bench.several_processes import CPU
from biroute.launcher.bench.single_process import join_alone, set_router
from biroute.launcher.train.schedule import learning_rate
from biroute.parallel.engine.engine import Engine, Microbatch, build_engine
from biroute.parallel.mesh.mesh import Mesh


@dataclass(frozen=True)
class Score:
    """How well a model predicts the held-out sequences."""

    nats_per_token: float
    bits_per_byte: float


def score(engine: Engine, batches: Sequence[Batch]) -> Score:
    """Evaluate the model on the batches."""
    nats = engine.evaluate([Microbatch.of(*b.arrays, mesh=engine.mesh, device=CPU) for b in batches])
    tokens_per_byte = sum(b.target_tokens for b in batches) / sum(b.target_bytes for b in batches)
    return Score(nats, nats * tokens_per_byte / math.log(2))


def train_variant(config: RunConfig, mesh: Mesh) -> tuple[Score, Score | None]:
    """Train a configuration on a mesh of one rank.

    Returns:
        The score as trained, and the score under a random route (None if the attention does not route).
    """
    dataset = open_dataset(config)
    heldout = list(dataset.heldout_batches(data_rank=0, data_size=1))
    engine = build_engine(config, mesh, CPU)
    with dataset.train_loader(data_rank=0, data_size=1) as loader:
        for step in range(1, config.train.steps + 1):
            rate = learning_rate(config.optim, step, config.train.steps)
            engine.train_step([Microbatch.of(*b.arrays, mesh=mesh, device=CPU) for b in loader.step()], rate)
    trained = score(engine, heldout)
    if config.model.attention.kind != "bi_level":
        return trained, None
    set_router(engine.deepspeed, "random")
    return trained, score(engine, heldout)


def rows_depend_on(config: RunConfig) -> dict[str, Any]:
    """Return the sections that affect a variant's score, as plain values; layout, tracking and so on do not."""
    return config.model_dump(mode="json", include={"model", "data", "optim", "train"})


def run_bench(
    config: RunConfig, steps: int, seeds: int, patterns: Sequence[str] = (), rows_path: Path | None = None
) -> dict[str, Any]:
    """Train and score the chosen variants, and return the results as plain values.

    Args:
        config: the configuration that all variants change.
        steps: optimizer steps of each variant and seed.
        seeds: number of seeds.
        patterns: names of variants, with `*` as a wildcard; empty for the usual ones.
        rows_path: file that keeps each row when it is finished. Rows of the same settings (`rows_depend_on`) and
            seeds are read from it instead of measured again. None to keep no rows.

    Raises:
        UsageError: there is no such variant, no seed or no dataset, the objective is not causal, or the file is not a
            file of rows.
    """
    if seeds < 1 or steps < 1:
        raise UsageError(f"--seeds {seeds} --steps {steps}: use at least 1 of each")
    if not config.model.causal:
        raise UsageError(f"model.objective={config.model.objective}: this benchmark trains causal models")
    names = select(VARIANTS, patterns, VARIANTS)
    about_run = environment_info()  # recorded first, since the code may change during the run
    dataset = open_dataset(config)  # reports errors before anything is trained
    kept = KeptRows(rows_path, [rows_depend_on(config), dataset.manifest.tokenizer_fingerprint, steps, seeds])
    plans = {name: [variant_config(config, name, seed, steps) for seed in range(seeds)] for name in names}
    mesh = join_alone(plans[names[0]][0])
    rows = [kept.row(name, partial(_run_variant, name, configs, mesh)) for name, configs in plans.items()]
    model = config.model
    return {
        "benchmark": "quality",
        "environment_info": about_run,
        "settings": {
            "steps": steps,
            "tokens_per_step": config.tokens_per_step,
            "model": model.model_dump(mode="json"),
            "vocab_size": config.data.tokenizer.vocab_size,
            "learning_rate": config.optim.learning_rate,
            "heldout_sequences": config.train.evaluate_sequences,
            "tokens_seen": model.attention.region_size * model.attention.topk,
        },
        "seeds": list(range(seeds)),
        "rows": rows,
    }


def _run_variant(name: str, configs: Sequence[RunConfig], mesh: Mesh) -> dict[str, Any]:
    """Measure one row: the variant with every seed."""
    started = time.perf_counter()
    scores = [train_variant(config, mesh) for config in configs]
    attention = configs[0].model.attention
    routes = attention.kind == "bi_level"
    bits = [trained.bits_per_byte for trained, _ in scores]
    seconds = time.perf_counter() - started
    say(f"{name}: {mean(bits):.4f} bits per byte ({each(bits)}), {seconds:.0f} s")
    return {
        "name": name,
        "kind": attention.kind,
        "region_size": attention.region_size,
        "query_block_size": attention.query_block_size,
        "topk": attention.topk,
        "descriptors_per_region": attention.descriptors_per_region,
        "key_smear": configs[0].model.key_smear,
        "dense_layers": list(configs[0].model.dense_layers),
        "bits_per_byte": bits,
        "nats_per_token": [trained.nats_per_token for trained, _ in scores],
        "random_route": [random.bits_per_byte for _, random in scores if random is not None] if routes else None,
        "seconds": seconds,
    }
