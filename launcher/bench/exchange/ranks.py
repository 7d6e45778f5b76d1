"""Measure one forward and backward pass of a trained model on real ranks that share a sequence."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from biroute.configs.layout import resolve_layout
from biroute.configs.schema import RunConfig
from biroute.launcher.bench.several_processes import CPU, reports_of_ranks
from biroute.model.language_model import LayerSequence, loss_function, plan_layers
from biroute.parallel.checkpoint.weights import load_weights, read_weights
from biroute.parallel.engine.engine import Microbatch, region_shard
from biroute.parallel.mesh.megatron import prepare_megatron
from biroute.parallel.mesh.mesh import build_mesh
from biroute.parallel.phase_clock import PhaseClock

# The kinds of payload in the forward pass that a plan counts: what a requester receives, and what it sends.
RECEIVED_PAYLOAD, SENT_PAYLOAD = ("keys", "results"), ("queries",)


@dataclass(frozen=True)
class RankJob:
    """The work of the ranks: the model of `config`, with the weights of a checkpoint, on one microbatch."""

    config: RunConfig
    checkpoint: Path | None
    microbatch: Microbatch


def routed_layers(config: RunConfig) -> list[int]:
    """Return the layers that route."""
    return [layer for layer in range(config.model.num_layers) if config.model.attention_kind(layer) == "bi_level"]


def run_on_ranks(job: RankJob, ranks: int) -> list[dict[str, Any]]:
    """Run a job on `ranks` new processes that share its sequences, and return the report of each."""
    parallel = job.config.parallel.model_copy(update={"region": ranks, "data": 1})
    job = RankJob(job.config.model_copy(update={"parallel": parallel}), job.checkpoint, job.microbatch)
    return reports_of_ranks(forward_and_backward, (job, CPU), ranks, job.config.train)


def forward_and_backward(job: RankJob, device: torch.device) -> dict[str, Any]:
    """Run this rank's part of a job; collective over all ranks.

    Returns:
        The payload of the forward pass as planned and as measured and the received bytes of each kind, both in bytes;
        seconds; and the loss.
    """
    config = job.config
    prepare_megatron(device)
    mesh = build_mesh(resolve_layout(config, dist.get_world_size()))
    clock = PhaseClock()
    shard = region_shard(config, mesh, clock)
    assert shard is not None
    module = LayerSequence(plan_layers(config, mesh.groups, shard))
    if job.checkpoint is not None:
        load_weights(module, dict(read_weights(job.checkpoint)))
    inputs, *targets = (mesh.own_tokens(x) for x in (job.microbatch.inputs, *job.microbatch.targets))
    loss_of = loss_function(config.model, mesh.layout.region)
    dist.barrier()
    clock.take()
    started = time.perf_counter()
    loss = loss_of(module(inputs), *targets)
    log = shard.transport.log
    routed = routed_layers(config)
    # Counted before the backward pass, in which a recomputed layer would plan and move its data again.
    payload = sum(
        int(count.sum())
        for counts, kinds in ((log.received, RECEIVED_PAYLOAD), (log.sent, SENT_PAYLOAD))
        for (layer, kind), count in counts.items()
        if kind in kinds and layer in routed
    )
    planned = sum(log.planned[layer] for layer in routed)
    loss.backward()
    received: dict[str, int] = {}
    for (_, kind), count in log.received.items():
        received[kind] = received.get(kind, 0) + int(count.sum())
    return {
        "payload": payload,
        "planned": planned,
        "received": received,
        "wait_seconds": clock.take()["exchange"],
        "seconds": time.perf_counter() - started,
        "loss": float(loss.detach()),
    }
