"""`biroute train`: check everything that can be checked without torch, then start the ranks or join them."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from biroute.configs.layout import Layout, default_world_size, resolve_layout
from biroute.configs.load import load_config, write_config
from biroute.configs.messages import printable
from biroute.configs.schema import RunConfig
from biroute.data_pipeline.dataset import open_dataset
from biroute.launcher.attempts.failures import explain_end
from biroute.launcher.attempts.journal import FencingToken, begin_attempt, end_attempt, make_run_dir
from biroute.launcher.attempts.run_files import CHECKPOINTS, frozen_config, log_dir
from biroute.launcher.plan.hardware import load_hardware
from biroute.launcher.ranks.environment import started_by_launcher
from biroute.launcher.start.local import run_local_ranks
from biroute.launcher.start.worker import train_rank
from biroute.launcher.track.tracker import close_after_crash
from biroute.launcher.track.uri import experiment_name, tracking_uri
from biroute.launcher.train.identity import about_run
from biroute.parallel.checkpoint.files import check_newest


def train_here(config_path: Path, overrides: Sequence[str], processes: int | None) -> int:
    """Train with local ranks, or as one rank if another launcher started this process; returns the exit status.

    Raises:
        UsageError: the configuration, the layout or the dataset is not usable.
    """
    config = load_config(config_path, overrides)
    if started_by_launcher():
        return train_rank(str(config_path), list(overrides))
    return train_on_ranks(config, processes or _processes_wanted(config))


def train_on_ranks(config: RunConfig, world_size: int) -> int:
    """Train with so many local ranks; returns the exit status.

    Raises:
        UsageError: the layout or the dataset is not usable.
    """
    layout = resolve_layout(config, world_size)
    check_inputs(config, layout)
    make_run_dir(config.train.run_dir)
    return _run_attempt(config, world_size)


def check_inputs(config: RunConfig, layout: Layout) -> None:
    """Check what a run reads: dataset, newest checkpoint, hardware profile, tracking URI. Nothing is written.

    Raises:
        UsageError: one of them is not usable.
    """
    dataset = open_dataset(config)
    dataset.heldout_batches(data_rank=0, data_size=layout.data)  # is there enough held-out text?
    check_newest(config.train.run_dir / CHECKPOINTS, about_run(config, dataset))
    if config.train.hardware:
        load_hardware(config.train.hardware, "train.hardware=")
    if config.tracking.enabled:
        tracking_uri(config, config.train.run_dir, create=False)  # reports a bad URI now rather than in a minute
        experiment_name(config)


def _run_attempt(config: RunConfig, world_size: int) -> int:
    """Train with local ranks. They read the configuration that was checked here, not a file that may change."""
    run_dir = config.train.run_dir
    attempt = begin_attempt(run_dir, nodes=[socket.gethostname()], world_size=world_size)
    fencing_token, logs = FencingToken(run_dir, attempt), log_dir(run_dir, attempt)
    frozen = frozen_config(run_dir, attempt)
    write_config(frozen, config)
    count = f"{world_size} rank{'s' if world_size > 1 else ''}"
    with contextlib.suppress(OSError):  # nobody reads it any more, or its disk is full: no reason not to train
        print(printable(f"attempt {attempt}: starting {count}, logs in {logs}"), flush=True)
    status = run_local_ranks([str(frozen)], world_size, logs, attempt)
    end = explain_end(logs, status)
    end_attempt(run_dir, attempt, end, limits=None)
    if end.crash and fencing_token.holds():
        print(
            printable(f"attempt {attempt} ended: {end.cause}; run the same command again to resume"), file=sys.stderr
        )
        close_after_crash(fencing_token)
    return status


def _processes_wanted(config: RunConfig) -> int:
    """Return the default number of ranks: one per GPU if data parallelism may use them, or else the layout's."""
    needed = default_world_size(config)
    gpus = 0 if config.train.device == "cpu" else _visible_gpus()
    if config.parallel.data is None and gpus > needed:
        return gpus - gpus % needed
    return needed


def _visible_gpus() -> int:
    """Count the GPUs of this machine without importing torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return len([device for device in named.split(",") if device.strip()])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
