"""One rank of a training run, from its configuration to its last step: all parts are assembled here."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from typing import TextIO

import torch
import torch.distributed as dist

from biroute.configs.errors import EXIT_OK, EXIT_STOPPED, FencedError, StoppedError, UsageError
from biroute.configs.files import write_atomically
from biroute.configs.layout import Layout, resolve_layout
from biroute.configs.load import write_config
from biroute.configs.schema import RunConfig
from biroute.data_pipeline.dataset import EVALUATE_SEQUENCES, Dataset, open_dataset
from biroute.launcher.attempts.failures import explain_end, record_stop
from biroute.launcher.attempts.journal import FencingToken
from biroute.launcher.attempts.run_files import CHECKPOINTS, CONFIG, TOKENIZER, log_dir
from biroute.launcher.attempts.watchdog import Watchdog
from biroute.launcher.ranks.agreement import check_same
from biroute.launcher.ranks.rendezvous import Place, collective_timeout, leave_processes
from biroute.launcher.ranks.stop_consensus import StopConsensus
from biroute.launcher.ranks.stop_signal import StopRequest
from biroute.launcher.track.tracker import Status
from biroute.launcher.train.hooks import TrainerHook
from biroute.launcher.train.identity import about_run, describe, writer
from biroute.launcher.train.measurements import Measurements
from biroute.launcher.train.observer import Observer
from biroute.launcher.train.stragglers import Stragglers
from biroute.launcher.train.system_metrics import SystemMetrics
from biroute.launcher.train.trainer import Trainer
from biroute.parallel.checkpoint.files import list_checkpoints
from biroute.parallel.checkpoint.load import load_checkpoint
from biroute.parallel.engine.engine import build_engine
from biroute.parallel.mesh.megatron import prepare_megatron
from biroute.parallel.mesh.mesh import build_mesh
from biroute.parallel.messages import broadcast_message, gather_messages


def run(
    config: RunConfig,
    place: Place,
    stop: StopRequest,
    fencing_token: FencingToken,
    watchdog: Watchdog,
    hooks: Sequence[TrainerHook] = (),
    log: TextIO | None = None,
) -> None:
    """Train as one of the ranks that have joined, from the newest checkpoint if there is one. Collective.

    `hooks` are called on this rank, after BiRoute's own. What rank 0 prints also goes to `log`.

    Raises:
        UsageError: the input is not usable.
        StoppedError: a signal asked to stop; the state is saved.
        FencedError: another attempt owns the run folder.
    """
    layout = resolve_layout(config, place.world_size)
    hosts = gather_messages(socket.gethostname())
    dataset = _open_dataset(config, hosts, place.rank)
    check_same({"checksum of the dataset's manifest": dataset.manifest.checksum[:12]})
    stop_consensus = StopConsensus(stop, fencing_token, place.device)
    stop_consensus.check_before_training()
    logs = log_dir(config.train.run_dir, fencing_token.attempt)
    if place.rank == 0:
        write_config(config.train.run_dir / CONFIG, config)
        # So that the run's checkpoints can be used where its dataset is not, or no longer.
        write_atomically(config.train.run_dir / TOKENIZER, dataset.tokenizer.model_bytes)
        hooks = [Observer(config, layout, dataset, fencing_token, log), *hooks]

    status: Status = "FAILED"
    cause = "an error on rank 0"
    stopped: StoppedError | None = None
    try:
        _train(config, place, layout, dataset, fencing_token.attempt, stop_consensus, watchdog, hooks, hosts)
        status, cause = "FINISHED", explain_end(logs, EXIT_OK).cause
    except StoppedError as error:  # on all ranks
        stopped = error
        if place.rank == 0:
            record_stop(logs, watchdog.step or None, stop_consensus.signal_name)
        status, cause = "KILLED", explain_end(logs, EXIT_STOPPED).cause
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        if not isinstance(error, FencedError):
            watchdog.failed(error)  # before the tracker is closed, which may take longer than the launcher waits
        raise
    finally:
        watchdog.allow(config.tracking.flush_seconds)
        for hook in hooks:
            hook.on_end(status, cause)
    if stopped is None:
        dist.barrier()  # no rank leaves while another still needs it
    leave_processes(dist.get_backend(), dist.destroy_process_group)
    if stopped is not None:
        raise stopped


def _train(
    config: RunConfig,
    place: Place,
    layout: Layout,
    dataset: Dataset,
    attempt: int,
    stop_consensus: StopConsensus,
    watchdog: Watchdog,
    hooks: Sequence[TrainerHook],
    hosts: Sequence[str],
) -> None:
    """Build the engine and its data, and train to the last step, from the newest checkpoint if there is one."""

    def say(text: str) -> None:
        for hook in hooks:
            hook.on_message(text)

    prepare_megatron(place.device)
    for line in _first_lines(config, dataset, layout, place.device):
        say(line)
    mesh = build_mesh(layout, collective_timeout(config.train))
    checkpoints = config.train.run_dir / CHECKPOINTS
    # One answer for all ranks: what one of them sees of a shared folder may be some seconds old.
    resumes = broadcast_message(bool(list_checkpoints(checkpoints)))
    engine = build_engine(config, mesh, place.device, draw_weights=not resumes)
    stop_consensus.check_before_training()
    about = about_run(config, dataset) | {"layout": str(layout), "written_by": writer(attempt)}
    progress = load_checkpoint(engine, checkpoints, about, say)
    if resumes and progress is None:
        raise RuntimeError(f"{checkpoints}: the checkpoints were removed while this attempt started")
    stop_consensus.check_before_training()
    position = progress.sequences if progress else 0
    loader = dataset.train_loader(data_rank=mesh.at.data, data_size=layout.data, position=position)
    heldout = dataset.heldout_batches(data_rank=mesh.at.data, data_size=layout.data)
    system = SystemMetrics(hosts, place.rank, place.device)
    measurements = Measurements(engine, system, Stragglers(layout, hosts, say))
    trainer = Trainer(
        config, engine, loader, heldout, checkpoints, about, stop_consensus, watchdog, measurements, hooks
    )
    if progress is not None:
        trainer.resume(progress)
    with loader:
        trainer.fit()


def _open_dataset(config: RunConfig, hosts: Sequence[str], rank: int) -> Dataset:
    """Open the dataset. Collective: the ranks of a node share the check of its shards, which may be thousands.

    Raises:
        UsageError: a check failed on any rank; on all ranks.
    """
    on_node = [other for other, host in enumerate(hosts) if host == hosts[rank]]
    dataset, problem = None, None
    try:
        dataset = open_dataset(config, on_node.index(rank), len(on_node))
    except UsageError as error:
        problem = str(error)
    problem = next((found for found in gather_messages(problem) if found is not None), None)
    if problem is not None or dataset is None:
        raise UsageError(problem)
    return dataset


def _first_lines(config: RunConfig, dataset: Dataset, layout: Layout, device: torch.device) -> Iterator[str]:
    """Say what is trained on what, and what of the data is left out."""
    yield f"{describe(config, layout)}, on {'GPUs' if device.type == 'cuda' else 'CPUs'}"
    if config.train.evaluate_sequences is None:
        used, there = (
            dataset.evaluate_sequences(config.train.microbatch_size * layout.data),
            dataset.heldout_sequences,
        )
        if there < EVALUATE_SEQUENCES:
            yield f"evaluations use {used} held-out sequences of the {there} that there are"
    yield from dataset.manifest.left_out(config.model.sequence_length)
