"""`biroute submit`: check a run, freeze its configuration and code into its folder, and submit it. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from biroute.configs.cluster_profile import ClusterProfile, dump_profile, load_profile
from biroute.configs.errors import DISK_FULL, UsageError
from biroute.configs.files import append_file, try_writing, write_atomically
from biroute.configs.layout import Layout, default_world_size, resolve_layout
from biroute.configs.load import load_config, write_config
from biroute.configs.schema import RunConfig
from biroute.launcher.attempts.run_files import (
    CHECKPOINTS,
    CODE,
    CONFIG,
    EVALUATE_SCRIPT,
    HARDWARE,
    JOBS,
    LOGS,
    PROFILE,
    SCRIPT,
    SUBMISSION,
)
from biroute.launcher.plan.cluster import plan_with_profile
from biroute.launcher.start.train import check_inputs
from biroute.launcher.track.uri import absolute_uri
from biroute.slurm import client
from biroute.slurm.evaluation import EvaluationRequest, render_evaluation
from biroute.slurm.forecast import Forecast, make_forecast
from biroute.slurm.script import JobRequest, render_job
from biroute.slurm.snapshot import snapshot_code


@dataclass(frozen=True)
class Submission:
    """Everything that a submission writes, decided before any file is touched."""

    config: RunConfig  # resolved, with absolute paths
    profile: ClusterProfile
    layout: Layout
    request: JobRequest
    script: str
    forecast: Forecast | None  # None if the profile names no hardware profile
    evaluation: EvaluationRequest | None = None  # a job that evaluates its checkpoints


def prepare(
    config_path: Path, overrides: Sequence[str], working_dir: Path, partition: str | None = None
) -> Submission:
    """Check the configuration, dataset, layout and request, and render the script, without writing anything.

    `partition` takes the place of the profile's.

    Raises:
        UsageError: one of them is not usable, or the run cannot fit in memory.
    """
    config = load_config(config_path, overrides)
    profile = load_profile(config.slurm.profile)
    if partition is not None:
        profile = profile.model_copy(update={"partition": partition})
    ranks_per_node = _ranks_per_node(config, profile)
    layout = _layout(config, profile, ranks_per_node)
    time_limit = config.slurm.time_limit or profile.time_limit
    _check_signal(config, time_limit)
    check_inputs(config, layout)
    plan = plan_with_profile(config, layout, profile, ranks_per_node)
    forecast = make_forecast(plan, time_limit) if plan is not None else None
    if forecast is not None:
        forecast.check_fits()
    config = _on_gpus(_with_absolute_paths(config, working_dir), profile)
    if ":" in str(config.train.run_dir):
        raise UsageError(
            f"train.run_dir={config.train.run_dir}: a colon would split PYTHONPATH, and the job would not run the "
            "code that was submitted; use another name, such as with '-' for ':'"
        )
    if any(sign in str(config.train.run_dir) for sign in "\\\n\r"):
        raise UsageError(
            f"train.run_dir={str(config.train.run_dir)!r}: Slurm accepts no backslash or line break in a path"
        )
    request = JobRequest(
        run_dir=config.train.run_dir,
        working_dir=working_dir,
        profile=profile,
        python=_python(profile),
        host_python=sys.executable,
        nodes=config.slurm.nodes,
        ranks_per_node=ranks_per_node,
        time_limit=time_limit,
        signal_seconds=config.slurm.signal_seconds,
        requeue=config.slurm.requeue,
        max_restarts=config.slurm.max_restarts,
        below_mount_point=os.path.ismount(config.train.run_dir.parent.resolve()),
    )
    return Submission(config, profile, layout, request, render_job(request), forecast)


def with_evaluation(submission: Submission, arguments: tuple[str, ...], time_limit: str | None) -> Submission:
    """Add a job that evaluates the checkpoints beside the training, with `arguments` of `biroute evaluate`."""
    return replace(submission, evaluation=EvaluationRequest(submission.request, arguments, time_limit))


def _on_gpus(config: RunConfig, profile: ClusterProfile) -> RunConfig:
    """On a cluster with GPUs, require CUDA, so that a node without a working GPU does not train on its CPU."""
    if not profile.gpus_per_node or config.train.device != "auto":
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"device": "cuda"})})


def submit_run(submission: Submission) -> str:
    """Freeze the run into its folder, submit it and return the job's id.

    Raises:
        UsageError: the folder belongs to another run or can't be written, or Slurm refuses the job. The folder is
            then left as it was.
        UnclearError: the job may have been queued; the folder is kept.
    """
    run_dir = submission.request.run_dir
    check_run_dir(run_dir)
    _check_no_job(submission.request)
    _check_partition(submission.request)  # also whether there is a Slurm: nothing is written before
    client.test_script(submission.script)
    folder = run_dir / SUBMISSION
    with explain_run_dir_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    with explain_run_dir_errors(run_dir):
        _claim(folder)
    try:
        with explain_run_dir_errors(run_dir):
            freeze(submission, folder)
    except BaseException:  # Ctrl-C as well: sbatch has not been called
        _remove(folder)
        raise
    try:
        job_id = client.submit(submission.request.script)
    except client.UnclearError:
        raise
    except UsageError:  # a refusal; after anything else a job may need the folder
        _remove(folder)
        raise
    record_job(run_dir, job_id, "submit", ())
    return job_id


def _remove(folder: Path) -> None:
    """Remove a submission of which no job can know, and what else is empty in its run folder."""
    shutil.rmtree(folder, ignore_errors=True)
    for left in (folder.parent / LOGS, folder.parent):
        with contextlib.suppress(OSError):
            left.rmdir()  # only if it is empty


def _claim(folder: Path) -> None:
    """Create the folder of a submission, which only one of several at a time can."""
    try:
        folder.mkdir()
    except FileExistsError:
        raise UsageError(f"train.run_dir={folder.parent}: another submission of this folder is under way") from None


def check_request(request: JobRequest) -> None:
    """Check what can be checked of a submission without writing; without Slurm on this machine, the folder only.

    Raises:
        UsageError: the run folder is in use or cannot be written, or the partition is too small.
    """
    check_run_dir(request.run_dir)
    if shutil.which("sinfo") is None:
        return
    _check_no_job(request)
    try:
        _check_partition(request)
    except client.NoAnswerError as error:
        print(f"warning: {error}; the partition is not checked", file=sys.stderr)


def check_run_dir(run_dir: Path) -> None:
    """Check that the run folder does not exist, or holds nothing but checkpoints to start from.

    Raises:
        UsageError: the folder contains something, or cannot be read or written.
    """
    _check_writable(run_dir)
    try:
        content = sorted(entry.name for entry in run_dir.iterdir() if entry.name != CHECKPOINTS)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"train.run_dir={run_dir}: {error.strerror}; use a folder that can be written") from None
    if SUBMISSION in content:
        raise UsageError(
            f"train.run_dir={run_dir} holds a submitted run; continue it with `biroute resume {run_dir}`, or set "
            "train.run_dir to a new folder"
        )
    if content:
        raise UsageError(
            f"train.run_dir={run_dir} is not empty ({', '.join(content[:3])}{', ...' if content[3:] else ''}); "
            "set train.run_dir to a new folder"
        )


def _check_no_job(request: JobRequest) -> None:
    """Refuse a folder in which a job of an earlier run, since deleted or moved, would find this one.

    Raises:
        UsageError: such a job is queued or running. Where Slurm does not say, there is none.
    """
    queue: list[client.Job] = []
    with contextlib.suppress(UsageError):
        queue = client.queue(seconds=client.LOOK_SECONDS)
    for job in queue:
        if job.script is not None and job.script.parent == request.script.parent:
            raise UsageError(
                f"train.run_dir={request.run_dir}: job {job.job_id}, {job.state}, belongs to a run that was there "
                f"before and would take this one's place; end it with `scancel {job.job_id}`, or set train.run_dir "
                "to a new folder"
            )


def _check_writable(run_dir: Path) -> None:
    """Check that the run folder, or the nearest one above it that exists, can be written."""
    there = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    try:
        try_writing(there)
    except OSError as error:
        raise UsageError(
            f"train.run_dir={run_dir}: {there} cannot be written ({error.strerror}); use a folder that can be"
        ) from None


def record_job(run_dir: Path, job_id: str, by: str, changes: Sequence[str]) -> None:
    """Append a job to the list of the run's jobs; `by` is "submit", or "resume" with the `changes` asked for."""
    record = {"job_id": job_id, "submitted": time.time(), "by": by}
    line = json.dumps(record | ({"changes": list(changes)} if changes else {}), ensure_ascii=False)
    with append_file(run_dir / SUBMISSION / JOBS) as file:
        file.write(line.encode() + b"\n")


@contextlib.contextmanager
def explain_run_dir_errors(run_dir: Path) -> Iterator[None]:
    """Turn the error of a full disk or of a folder that is not writable into a UsageError."""
    try:
        yield
    except (OSError, shutil.Error) as error:
        full = getattr(error, "errno", None) in DISK_FULL or "No space left" in str(error)
        cause = "the disk is full; free some space" if full else f"{getattr(error, 'strerror', None) or error}"
        raise UsageError(f"train.run_dir={run_dir}: {cause}, or set train.run_dir to another folder") from None


def freeze(submission: Submission, folder: Path) -> None:
    """Write all that the job needs into `folder`, which is empty.

    Raises:
        OSError: it cannot be written.
    """
    (folder.parent / LOGS).mkdir(exist_ok=True)
    snapshot_code(folder / CODE)
    freeze_request(submission, folder)


def freeze_request(submission: Submission, folder: Path) -> None:
    """Write what a job is asked to do into `folder`: profile, configuration and script.

    Raises:
        OSError: it cannot be written.
    """
    profile, kept = folder / PROFILE, submission.profile
    if kept.hardware and Path(kept.hardware).is_file():  # and no shipped name: it may change or go before a resume
        write_atomically(folder / HARDWARE, Path(kept.hardware).read_bytes())
        kept = kept.model_copy(update={"hardware": HARDWARE})
    # Nobody else's to read: the environment in the profile, and so in the script, may hold a token.
    write_atomically(profile, dump_profile(kept).encode(), private=True)
    frozen = {"profile": str(profile), "ranks_per_node": submission.request.ranks_per_node}
    frozen_slurm = submission.config.slurm.model_copy(update=frozen)
    config = submission.config.model_copy(update={"slurm": frozen_slurm})
    write_config(folder / CONFIG, config)
    scripts = {SCRIPT: submission.script}
    if submission.evaluation is not None:
        scripts[EVALUATE_SCRIPT] = render_evaluation(submission.evaluation)
    for name, text in scripts.items():
        write_atomically(folder / name, text.encode(), private=True)
        (folder / name).chmod(0o700)


def _ranks_per_node(config: RunConfig, profile: ClusterProfile) -> int:
    nodes, wanted = config.slurm.nodes, config.slurm.ranks_per_node
    if wanted is None and profile.gpus_per_node:
        wanted = profile.gpus_per_node
    if wanted is None:
        ranks = default_world_size(config)
        if config.parallel.data is None and ranks < nodes:
            ranks = nodes  # one data-parallel rank per node
        if ranks % nodes:
            raise UsageError(
                f"slurm.nodes={nodes} does not divide the layout's {ranks} ranks; set slurm.ranks_per_node, or other "
                "sizes in parallel"
            )
        wanted = ranks // nodes
    if profile.gpus_per_node and wanted > profile.gpus_per_node:
        raise UsageError(
            f"slurm.ranks_per_node={wanted} is more than the profile's gpus_per_node={profile.gpus_per_node}; "
            "a rank needs a GPU"
        )
    return wanted


def _layout(config: RunConfig, profile: ClusterProfile, ranks_per_node: int) -> Layout:
    """Resolve the layout on nodes x ranks; raises UsageError if they don't fit."""
    parallel, nodes = config.parallel, config.slurm.nodes
    ranks = nodes * ranks_per_node
    needed = default_world_size(config)
    fits = ranks == needed if parallel.data is not None else ranks % needed == 0
    if not fits:
        kind = "a multiple of " if parallel.data is None else ""
        sizes = f"{parallel.tensor} x {parallel.pipeline} x {parallel.region} x {parallel.data or 'data'}"
        raise UsageError(
            f"slurm.nodes x slurm.ranks_per_node = {nodes} x {ranks_per_node} = {ranks} ranks, but the layout "
            f"tensor x pipeline x region x data = {sizes} needs {kind}{needed}; change either"
        )
    return resolve_layout(config, ranks)


def _check_partition(request: JobRequest) -> None:
    """Reject a job with more nodes than its partition, which Slurm would leave in the queue forever."""
    largest = client.largest_partition(request.profile.partition)
    if largest is not None and request.nodes > largest[1]:
        raise UsageError(
            f"slurm.nodes={request.nodes}, but partition {largest[0]} has {largest[1]} nodes; request fewer, or name "
            "another partition in the profile"
        )


def limit_in_words(time_limit: str | None) -> str:
    """Say a time limit of Slurm's in words, as `24:00` is 24 minutes and not hours."""
    if not time_limit:
        return "with the partition's time limit"
    seconds = client.seconds_of(time_limit)
    if seconds is None:
        return "without a time limit"
    parts = []
    for unit, size in (("day", 86_400), ("hour", 3600), ("minute", 60), ("second", 1)):
        count, seconds = divmod(seconds, size)
        if count:
            parts.append(f"{count} {unit}{'s' if count > 1 else ''}")
    return f"for at most {' '.join(parts) or '0 seconds'}"


def _check_signal(config: RunConfig, time_limit: str | None) -> None:
    seconds = client.seconds_of(time_limit) if time_limit else None
    if seconds and seconds <= config.slurm.signal_seconds:
        raise UsageError(
            f"slurm.signal_seconds={config.slurm.signal_seconds} is not below the time limit {time_limit} "
            f"({seconds} s): the job would stop as soon as it starts; lower it or raise slurm.time_limit"
        )


def _python(profile: ClusterProfile) -> tuple[str, ...]:
    if profile.python:
        interpreter = profile.python
    elif profile.venv:
        interpreter = str(profile.venv / "bin" / "python")
    else:
        interpreter = "python3" if profile.container else sys.executable
    return (*profile.container, interpreter)


def _with_absolute_paths(config: RunConfig, base: Path) -> RunConfig:
    """Make every path of the configuration absolute, so that it does not depend on the working folder."""

    def absolute(path: Path | str) -> str:
        return os.path.normpath(base / path)

    data = config.data
    tokenizer = data.tokenizer
    if tokenizer.model_path is not None:
        tokenizer = tokenizer.model_copy(update={"model_path": Path(absolute(tokenizer.model_path))})
    sources = tuple(
        source.model_copy(update={"paths": tuple(absolute(path) for path in source.paths)}) for source in data.sources
    )
    data = data.model_copy(update={"dir": Path(absolute(data.dir)), "sources": sources, "tokenizer": tokenizer})
    train = config.train.model_copy(update={"run_dir": Path(absolute(config.train.run_dir))})
    tracking = config.tracking.model_copy(update={"uri": absolute_uri(config.tracking.uri, base)})
    return config.model_copy(update={"data": data, "train": train, "tracking": tracking})
