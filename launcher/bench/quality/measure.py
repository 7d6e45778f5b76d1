"""`biroute bench quality`: held-out bits per byte of one model on real text under every kind of attention.

The real model, engine and loader. Equal data, steps and initial weights for every variant; each is scored as trained
and, where it routes, with the same weights under a random route.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from biroute.configs.errors import UsageError
from biroute.configs.layout import resolve_layout
from biroute.configs.schema import RunConfig
from biroute.data_pipeline.dataset import open_dataset
from biroute.data_pipeline.read.loader import Batch
from biroute.launcher.bench.quality.variants import VARIANTS, variant_config
from biroute.launcher.bench.report import each, environment_info, mean, say, select
from biroute.launcher.bench.rows import KeptRows
from biroute.launcher.ranks.environment import RENDEZVOUS_FILE, find_rank_environment
from biroute.launcher.ranks.rendezvous import join_processes
from biroute.launcher.train.schedule import learning_rate
from biroute.model.attention.core import CoreAttention
from biroute.model.attention.rule import Router
from biroute.parallel.engine.engine import Engine, Microbatch, build_engine
from biroute.parallel.mesh.megatron import prepare_megatron
from biroute.parallel.mesh.mesh import Mesh, build_mesh

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Score:
    """How well a model predicts the held-out sequences."""

    nats_per_token: float
    bits_per_byte: float


def set_router(module: nn.Module, router: Router) -> None:
    """How all layers that route choose from now on."""
    for core in module.modules():
        if isinstance(core, CoreAttention) and core.rule is not None:
            core.rule = replace(core.rule, router=router)


def score(engine: Engine, batches: Sequence[Batch]) -> Score:
    """Mean loss over the batches."""
    nats = engine.evaluate([Microbatch.of(*b.arrays, mesh=engine.mesh, device=CPU) for b in batches])
    tokens_per_byte = sum(b.target_tokens for b in batches) / sum(b.target_bytes for b in batches)
    return Score(nats, nats * tokens_per_byte / math.log(2))


def train_variant(config: RunConfig, mesh: Mesh) -> tuple[Score, Score | None]:
    """Train as `config` says on the mesh of one rank; the score as trained, and under a random route if it routes."""
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


def join_alone(config: RunConfig) -> Mesh:
    """Make this process a group of one, unless it belongs to a group already.

    One mesh for all variants: the threads of gloo's groups are never joined, and would pile up.
    """
    prepare_megatron(CPU)
    if not dist.is_initialized():
        rendezvous = Path(tempfile.mkdtemp(prefix="biroute-bench-")) / "rendezvous"
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", RENDEZVOUS_FILE: str(rendezvous)})
        join_processes(find_rank_environment(), config.train)
    return build_mesh(resolve_layout(config, 1))


def rows_depend_on(config: RunConfig) -> dict[str, Any]:
    """The sections that decide what a variant scores, as plain values; layout, tracking and the like do not."""
    return config.model_dump(mode="json", include={"model", "data", "optim", "train"})


def run_bench(
    config: RunConfig, steps: int, seeds: int, patterns: Sequence[str] = (), rows_path: Path | None = None
) -> dict[str, Any]:
    """Train and score the chosen variants of `config`; the answer as plain values. `patterns`: names, `*` allowed.

    Rows are kept in `rows_path` as they come, and those of the same settings (`rows_depend_on`) and seeds are taken
    from there.

    Raises:
        UsageError: no such variant, no seed, a masked objective, no dataset; a file that is not a rows file.
    """
    if seeds < 1 or steps < 1:
        raise UsageError(f"--seeds {seeds} --steps {steps}: use at least 1 of each")
    if not config.model.causal:
        raise UsageError(f"model.objective={config.model.objective}: this benchmark trains causal models")
    names = select(VARIANTS, patterns, VARIANTS)
    about_run = environment_info()  # now: the code may change while this runs
    dataset = open_dataset(config)  # complains before anything is trained
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
    """One row: the variant with every seed."""
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
