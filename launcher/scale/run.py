"""Carry out a scaling study: each size is a run of its own, and what is finished is not run again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from biroute.configs.errors import EXIT_OK, EXIT_STOPPED, UsageError
from biroute.configs.files import file_lock, write_atomically
from biroute.configs.schema import RunConfig
from biroute.data_pipeline.dataset import open_dataset
from biroute.launcher.attempts.run_files import METRICS_LOG, UPLOAD_STATE
from biroute.launcher.plan.hardware import HardwareProfile
from biroute.launcher.plan.report import headline_tags
from biroute.launcher.scale.measure import is_finished, measure, metrics_of, plan_of
from biroute.launcher.scale.on_slurm import on_nodes, submit_sizes
from biroute.launcher.scale.report import NAME, study_note, study_page, study_values
from biroute.launcher.scale.study import Size, Study, open_study
from biroute.launcher.start.train import train_on_ranks
from biroute.launcher.track.metrics_log import Point
from biroute.launcher.track.mlflow_study import MlflowStudy
from biroute.launcher.track.sync import sync_run
from biroute.launcher.track.upload_state import read_state
from biroute.launcher.track.uri import tracking_uri

LOCK = ".lock"
Say = Callable[[str], None]


def run_study(
    study: Study, hardware: HardwareProfile | None, out: Path | None, say: Say, *, on_slurm: bool = False
) -> int:
    """Train the sizes that are not finished, one after the other, and report on all; returns the exit status.

    Args:
        study: what is to be trained.
        hardware: profile that predictions are made with; None: nothing is predicted.
        out: folder that gets a copy of the report; None: the study's own folder has it.
        say: takes lines for people.
        on_slurm: submit the sizes as jobs instead, and report on those that have ended.

    Raises:
        UsageError: the dataset, MLflow, Slurm or a folder is not usable, or another command works on this study.
    """
    for size in study.sizes:  # before anything is trained
        open_dataset(size.config).heldout_batches(data_rank=0, data_size=size.layout.data)
    if on_slurm:
        for size in study.sizes:
            on_nodes(size.config, size.ranks)
    if out is not None:
        _make(out)
    uri = tracking_uri(study.base, study.folder) if study.base.tracking.enabled else None
    key = open_study(study)
    try:
        with file_lock(study.folder / LOCK, 0.0, required=True):
            parent = None if uri is None else _begin(study, uri, key)
            config_of = partial(_config_of, study, hardware, parent, uri)
            if on_slurm:
                submit_sizes(study, config_of, say)
                status = EXIT_OK
            else:
                status = _train(study, config_of, say)
            _report(study, hardware, out, say, parent)
            _end(study, status, parent, say)
            return status
    except TimeoutError:
        raise UsageError(f"{study.folder}: another `biroute scale` works on this study; wait for its end") from None


def _train(study: Study, config_of: Callable[[Size], RunConfig], say: Say) -> int:
    for size in study.sizes:
        if is_finished(size):
            say(f"{size.name}: finished, in {size.run_dir}")
            continue
        say(f"{size.name}: {size.layout}, {study.steps} steps")
        status = train_on_ranks(_with_equal_threads(config_of(size)), size.ranks)
        if status != EXIT_OK:
            say(f"{size.name}: ended with exit status {status}; run the same command again to continue")
            return status
    return EXIT_OK


def _with_equal_threads(config: RunConfig) -> RunConfig:
    """Give each rank one thread, unless something else is set.

    With its share of the cores a rank would have the more threads the fewer ranks there are, and more ranks would
    seem to gain less than they do.
    """
    if config.train.threads_per_rank or "OMP_NUM_THREADS" in os.environ:
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"threads_per_rank": 1})})


def _report(
    study: Study, hardware: HardwareProfile | None, out: Path | None, say: Say, parent: MlflowStudy | None
) -> None:
    """Write and show the results of the sizes that are finished, and send them to MLflow."""
    found = [measure(size) for size in study.sizes if is_finished(size)]
    if not found:
        return
    values = study_values(study, found, hardware)
    written = _write(study.folder, values)
    for path in written if out is None else _copy(written, out):
        say(f"wrote {path}")
    study_page(values).show()
    if parent is None:
        return
    times = {one.ranks: one.ended_ms for one in found}
    points = [Point(one["ranks"], times[one["ranks"]], metrics_of(one)) for one in values["sizes"]]
    for one in found:
        _send_rest(one.size, say)
    parent.show(points, [one.run_id for one in found if one.run_id], study_note(values), written)


def _end(study: Study, status: int, parent: MlflowStudy | None, say: Say) -> None:
    waiting = [size for size in study.sizes if not is_finished(size)]
    if waiting and status == EXIT_OK:  # jobs
        say(f"{len(waiting)} of {len(study.sizes)} sizes have not ended; run the same command again to collect them")
    if parent is None:
        return
    if status != EXIT_OK or not waiting:  # otherwise it goes on
        parent.end({EXIT_OK: "FINISHED", EXIT_STOPPED: "KILLED"}.get(status, "FAILED"))
    say(f"MLflow: {parent.page}")


def _begin(study: Study, uri: str, key: str) -> MlflowStudy:
    parent = MlflowStudy(study.base, uri, study.folder)
    ranks = " ".join(str(size.ranks) for size in study.sizes)
    tags = {"scaling.mode": study.mode, "scaling.ranks": ranks, "scaling.steps": str(study.steps)}
    parent.begin(key, study.name, tags, study.sizes[0].run_dir)
    return parent


def _config_of(
    study: Study, hardware: HardwareProfile | None, parent: MlflowStudy | None, uri: str | None, size: Size
) -> RunConfig:
    """Return the configuration of a size, listed under the parent in the same store, with its prediction as tags."""
    if parent is None or uri is None:
        return size.config
    plan = plan_of(size, hardware)
    tracking = size.config.tracking
    changes: dict[str, Any] = {
        "uri": uri,
        "parent": parent.run_id,
        "run_name": f"{study.name}, {size.name}"[-250:],
        "tags": dict(tracking.tags) | (headline_tags(plan) if plan is not None else {}),
    }
    return size.config.model_copy(update={"tracking": tracking.model_copy(update=changes)})


def _send_rest(size: Size, say: Say) -> None:
    """Send what MLflow has not received of a size that has ended, for example because the machine went down."""
    try:
        state = read_state(size.run_dir / UPLOAD_STATE)
    except (OSError, ValueError, TypeError):
        return
    if state.target and state.sent_bytes < (size.run_dir / METRICS_LOG).stat().st_size:
        sync_run(size.run_dir, say)


def _write(folder: Path, values: dict[str, Any]) -> list[Path]:
    written = study_page(values).write(folder)
    path = folder / f"{NAME}.json"
    write_atomically(path, (json.dumps(values, indent=2) + "\n").encode())
    return [*written, path]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder}: {error.strerror}; use a folder that can be written") from None


def _copy(files: list[Path], folder: Path) -> list[Path]:
    try:
        return [Path(shutil.copy(path, folder)) for path in files]
    except OSError as error:
        raise UsageError(f"--out {folder}: {error.strerror}; use a folder that can be written") from None
