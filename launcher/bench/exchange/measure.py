"""`biroute bench exchange`: bytes between the ranks that share a sequence, for real routes of trained models.

One process computes routes of held-out text. From these routes, plans (pure functions) give the bytes for every
number of ranks and every way of exchange, which are compared with the bytes of other methods. For a few small numbers
of ranks, the same model also runs on gloo ranks, forward and backward, and the bytes that they count are compared
with the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from biroute.configs.errors import UsageError
from biroute.configs.layout import resolve_layout
from biroute.configs.load import load_config
from biroute.configs.schema import ParallelConfig, RunConfig
from biroute.data_pipeline.dataset import open_dataset
from biroute.launcher.attempts.run_files import CHECKPOINTS
from biroute.launcher.bench.exchange.plan import Routes, planned_rows, single_process_plan
from biroute.launcher.bench.exchange.ranks import RankJob, routed_layers, run_on_ranks
from biroute.launcher.bench.report import environment_info, say
from biroute.launcher.bench.several_processes import CPU
from biroute.launcher.bench.single_process import join_alone, set_router
from biroute.launcher.train.identity import model_identity
from biroute.model.attention.core import CoreAttention
from biroute.model.language_model import LayerSequence, loss_function, plan_layers
from biroute.parallel.checkpoint.files import check_same_model, list_checkpoints
from biroute.parallel.checkpoint.meta import read_meta
from biroute.parallel.checkpoint.weights import load_weights, newest_checkpoint, read_weights
from biroute.parallel.engine.engine import Microbatch
from biroute.parallel.mesh.mesh import build_mesh

RANKS = (2, 4, 8, 16, 32, 64, 128, 256)
MEASURED_RANKS = (2, 4, 8)


@dataclass(frozen=True)
class TrainedRun:
    """A trained run; its newest checkpoint is used to compute routes."""

    name: str
    config: RunConfig  # with the layout of one process


def open_run(path: Path, overrides: Sequence[str]) -> TrainedRun:
    """Open the run of a configuration.

    Raises:
        UsageError: the run has no checkpoint, or its model has no layer that routes.
    """
    config = load_config(path, list(overrides))
    if not list_checkpoints(config.train.run_dir / CHECKPOINTS):
        raise UsageError(f"train.run_dir={config.train.run_dir}: no checkpoint there; run biroute train {path} first")
    if not routed_layers(config):
        raise UsageError(f"{path}: no layer has model.attention.kind=bi_level; there is no route to measure")
    return TrainedRun(config.train.run_dir.name, config.model_copy(update={"parallel": ParallelConfig()}))


def at_length(config: RunConfig, length: int) -> RunConfig:
    """Change the sequence length of a configuration.

    Raises:
        UsageError: the length is not a multiple of the region size.
    """
    size = config.model.attention.region_size
    if length % size:
        raise UsageError(f"--length {length} is not a multiple of model.attention.region_size={size}")
    return config.model_copy(update={"model": config.model.model_copy(update={"sequence_length": length})})


@contextmanager
def recorded_routes(module: nn.Module) -> Iterator[Routes]:
    """Yield a dictionary that collects the routes of forward passes, with several passes concatenated along B."""
    routes: Routes = {}
    cores = [core for core in module.modules() if isinstance(core, CoreAttention) and core.kind == "bi_level"]

    def record(layer: int, route: Tensor) -> None:
        routes[layer] = torch.cat([routes[layer], route]) if layer in routes else route

    for core in cores:
        core.on_route = record
    try:
        yield routes
    finally:
        for core in cores:
            core.on_route = None


class Trained(NamedTuple):
    """What a trained model gives on held-out text."""

    routes: Routes
    random_routes: Routes  # the same weights under a random router
    nats_per_token: tuple[float, float]  # with the routes, with the random ones
    steps: int  # optimizer steps of its training
    job: RankJob  # one of the sequences, for real ranks


def trained_routes(config: RunConfig, sequences: int) -> Trained:
    """Run the newest checkpoint on the first held-out sequences in one process.

    Raises:
        UsageError: there is too little held-out text, or the checkpoint is of another model.
    """
    train = config.train.model_copy(
        update={"microbatch_size": 1, "global_batch_size": 1, "evaluate_sequences": sequences}
    )
    config = config.model_copy(update={"train": train})
    dataset = open_dataset(config)
    checkpoint = newest_checkpoint(train.run_dir / CHECKPOINTS)
    meta = read_meta(checkpoint)
    check_same_model(checkpoint, meta.model, model_identity(config, dataset.manifest.tokenizer_fingerprint))
    mesh = build_mesh(resolve_layout(config, 1))
    module = LayerSequence(plan_layers(config, mesh.groups, draw_weights=False)).eval()
    load_weights(module, dict(read_weights(checkpoint, verify=True)))
    batches = list(dataset.heldout_batches(data_rank=0, data_size=1))
    microbatches = [Microbatch.of(*b.arrays, mesh=mesh, device=CPU) for b in batches]
    with recorded_routes(module) as routes:
        loss = mean_loss(module, microbatches, config)
    set_router(module, "random")
    with recorded_routes(module) as random_routes:
        random_loss = mean_loss(module, microbatches, config)
    job = RankJob(config, checkpoint, microbatches[0])
    return Trained(routes, random_routes, (loss, random_loss), meta.progress.step, job)


@torch.no_grad()
def mean_loss(module: nn.Module, microbatches: Sequence[Microbatch], config: RunConfig) -> float:
    """Return the mean loss in nats per target token."""
    loss_of = loss_function(config.model)
    losses = [loss_of(module(microbatch.inputs), *microbatch.targets) for microbatch in microbatches]
    return float(sum(losses) / len(losses))


def run_bench(
    runs: Sequence[TrainedRun],
    *,
    lengths: Sequence[int] = (),
    ranks: Sequence[int] = RANKS,
    sequences: int = 2,
    measured_ranks: Sequence[int] = MEASURED_RANKS,
) -> dict[str, Any]:
    """Plan the exchange of every run at every length, measure it at the first one, and return plain values.

    Args:
        runs: the trained runs.
        lengths: sequence lengths in tokens; empty for the trained length of each run.
        ranks: numbers of ranks to plan for.
        sequences: number of held-out sequences to take routes from.
        measured_ranks: numbers of ranks to start for measurements; empty for none.

    Raises:
        UsageError: a length does not fit a model, there is too little held-out text, or a checkpoint is of another
            model.
    """
    about_run = environment_info()
    join_alone(runs[0].config)
    tables, measured = [], []
    for run in runs:
        own = run.config.model.sequence_length
        for number, length in enumerate(lengths or [own]):
            config = at_length(run.config, length)
            measure = number == 0 and bool(measured_ranks)
            found = trained_routes(config, sequences)
            say(f"{run.name}: routes of {sequences} sequences of {length} tokens")
            tables.append(
                {
                    "run": run.name,
                    "length": length,
                    "trained_length": own,
                    "trained_steps": found.steps,
                    "tokens_per_step": run.config.tokens_per_step,
                    "num_regions": config.model.num_regions,
                    "attention": config.model.attention.model_dump(mode="json"),
                    "nats_per_token": found.nats_per_token,
                    "rows": planned_rows(config, found.routes, found.random_routes, ranks),
                }
            )
            if measure:
                one = {layer: route[:1] for layer, route in found.routes.items()}
                measured += [_measured_row(run.name, found.job, one, size) for size in measured_ranks]
    model = runs[0].config.model
    return {
        "benchmark": "exchange",
        "environment_info": about_run,
        "settings": {
            "model": model.model_dump(mode="json"),
            "precision": runs[0].config.train.precision,
            "sequences": sequences,
        },
        "tables": tables,
        "measured": measured,
    }


def _measured_row(name: str, job: RankJob, routes: dict[int, Tensor], ranks: int) -> dict[str, Any]:
    """Measure a forward and backward pass of one sequence on real ranks, and compare it with the plans."""
    reports = run_on_ranks(job, ranks)
    row = {
        "run": name,
        "length": job.config.model.sequence_length,
        "ranks": ranks,
        "measured_payload": sum(report["payload"] for report in reports),
        "planned_payload": sum(report["planned"] for report in reports),
        "single_process_plan": single_process_plan(job.config, routes, ranks),
        "received_by_kind": {
            kind: sum(report["received"].get(kind, 0) for report in reports)
            for kind in sorted({kind for report in reports for kind in report["received"]})
        },
        "wait_seconds": max(report["wait_seconds"] for report in reports),
        "seconds": max(report["seconds"] for report in reports),
    }
    say(f"{name}: measured on {ranks} ranks")
    return row
