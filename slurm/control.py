"""Cancel a run (`biroute cancel`) and submit it again (`biroute resume`), perhaps changed. No torch."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from biroute.configs.errors import UsageError
from biroute.configs.files import create_once, file_lock, write_atomically
from biroute.configs.load import load_config, parse_yaml
from biroute.launcher.attempts.run_files import (
    CONFIG,
    EARLIER,
    EVALUATE_SCRIPT,
    HARDWARE,
    PROFILE,
    RESUME_LOCK,
    SCRIPT,
    SUBMISSION,
)
from biroute.slurm import client
from biroute.slurm.evaluation import submit_evaluation
from biroute.slurm.run_folder import RunFolder
from biroute.slurm.status import status_of
from biroute.slurm.submit import explain_run_dir_errors, freeze_request, prepare, record_job

_LOCK_SECONDS = 2.0


def cancel_run(run: RunFolder, *, now: bool) -> list[str]:
    """Mark the run as cancelled, so that it is not queued again, and end its jobs.

    Args:
        run: the run to cancel.
        now: end running jobs immediately; otherwise they save first.

    Returns:
        One line for each job, saying what was done.

    Raises:
        UsageError: the run is another user's or has no job, or Slurm refuses.
    """
    run.check_ours("cancel")
    queue = client.queue()
    jobs, evaluations = run.jobs_in(queue), run.evaluations_in(queue)
    if not jobs and not evaluations:
        raise UsageError(f"run {run.name} has no job queued or running; it is {status_of(run, []).state}")
    # Without jobs the training has ended, and what it was stays as it is; a submission that is gone takes no mark,
    # and its job is not queued again without it.
    if jobs and run.cancelled_mark.parent.is_dir():
        with explain_run_dir_errors(run.path):
            # First: a job's script looks for the mark as soon as its ranks have ended.
            create_once(run.cancelled_mark, b"")
    told, failed = [], []
    for job in [*jobs, *evaluations]:
        name = f"job {job.job_id}" if job in jobs else f"evaluation job {job.job_id}"
        try:
            if job in jobs and job.state == "RUNNING" and not now:
                client.ask_to_stop(job.job_id)
                told.append(f"{name} saves and ends (`biroute cancel --now` would not wait for it)")
            else:
                client.cancel(job.job_id)
                told.append(f"{name} cancelled")
        except UsageError as error:  # one job must not keep the others alive
            failed.append(f"{name}: {error}")
    if failed:
        marked = "the run is marked as cancelled, so none of its jobs is queued again: " if jobs else ""
        raise UsageError(f"{'; '.join([*told, *failed])}; {marked}run the same command again to end them")
    return told


def resume_evaluation(run: RunFolder, job_id: str) -> str | None:
    """Submit the follow-up job of a run again, beside its training's new job; None if it has none or still runs.

    Raises:
        UsageError: Slurm refuses the job, or does not answer.
    """
    script = run.path / SUBMISSION / EVALUATE_SCRIPT
    if not script.exists() or run.evaluations_in(client.queue()):
        return None
    return submit_evaluation(run.path, job_id)


def resume_run(run: RunFolder, overrides: Sequence[str] = (), partition: str | None = None) -> str:
    """Submit the run again and return the job's id.

    Without overrides and partition, its script is submitted as it is. With them, configuration and script are written
    anew, the earlier ones are kept beside them, and the change is recorded; the code stays what it was.

    Raises:
        UsageError: the run is another user's, was never submitted, has a job or is finished; an override is not
            usable; or Slurm refuses.
    """
    run.check_ours("resume")
    _check_submission(run)
    config = run.config()
    if config is not None and config.train.run_dir.resolve() != run.path.resolve():
        raise UsageError(
            f"{run.path} was copied or moved from {config.train.run_dir}, where its job would run; move it back, or "
            "submit a run with a new train.run_dir, after `biroute checkpoint copy`"
        )
    try:
        with file_lock(run.path / SUBMISSION / RESUME_LOCK, _LOCK_SECONDS, required=True):
            return _resume(run, overrides, partition)
    except TimeoutError:
        raise UsageError(f"run {run.name}: another `biroute resume` of it is under way; wait for its end") from None


def _resume(run: RunFolder, overrides: Sequence[str], partition: str | None) -> str:
    jobs = run.jobs_in(client.queue())
    if jobs:
        raise UsageError(
            f"run {run.name} has job {jobs[0].job_id}, {jobs[0].state}; wait for its end or `biroute cancel` it"
        )
    changes = [*overrides, *([f"partition={partition}"] if partition is not None else [])]
    if status_of(run, []).state == "finished" and not changes:
        raise UsageError(
            f"run {run.name} is finished: nothing to resume; `biroute resume {run.path} train.steps=N` trains it "
            "longer"
        )
    with _changed(run, overrides, partition) if changes else contextlib.nullcontext():
        job_id = _submit_again(run)
    record_job(run.path, job_id, "resume", changes)
    return job_id


def _check_submission(run: RunFolder) -> None:
    """Refuse to submit what is not all there: the job would end as soon as it begins."""
    if not run.script.parent.exists() and not run.job_ids():
        raise UsageError(f"run {run.name} was not submitted to Slurm; run its `biroute train` command again")
    missing = run.missing() or (None if run.script.exists() else run.script)
    if missing is not None:
        raise UsageError(
            f"run {run.name}: {missing} was deleted or moved; bring it back, or submit a run with a new "
            "train.run_dir, after `biroute checkpoint copy`"
        )


def _submit_again(run: RunFolder) -> str:
    marked = run.cancelled_mark.exists()
    with explain_run_dir_errors(run.path):
        run.cancelled_mark.unlink(missing_ok=True)
    try:
        return client.submit(run.script)
    except UsageError:
        if marked:
            create_once(run.cancelled_mark, b"")
        raise


@contextlib.contextmanager
def _changed(run: RunFolder, overrides: Sequence[str], partition: str | None) -> Iterator[None]:
    """Write the changed configuration, profile and script; if the body fails, the earlier ones come back."""
    folder = run.path / SUBMISSION
    names = [override.partition("=")[0] for override in overrides]
    submission = prepare(folder / CONFIG, overrides, Path.cwd(), partition)
    if submission.request.run_dir.resolve() != run.path.resolve():
        raise UsageError("train.run_dir cannot change in a resume; submit a new run, after `biroute checkpoint copy`")
    client.test_script(submission.script)
    earlier = folder / EARLIER
    with explain_run_dir_errors(run.path):
        frozen = parse_yaml((folder / CONFIG).read_text(encoding="utf-8"))
        number = 1 + max((int(path.name) for path in earlier.glob("[0-9]*")), default=0)
        kept = earlier / f"{number:04d}"
        kept.mkdir(parents=True)
        frozen_files = [name for name in (CONFIG, PROFILE, SCRIPT, HARDWARE) if (folder / name).exists()]
        for name in frozen_files:
            shutil.copy2(folder / name, kept / name)
        freeze_request(submission, folder)
        # Only what was asked for: the frozen code may be older than this and know fewer fields.
        resolved = parse_yaml((folder / CONFIG).read_text(encoding="utf-8"))
        for name in [*names, "slurm.profile", "slurm.ranks_per_node"]:
            _copy_field(resolved, frozen, name.split("."))
        text = yaml.safe_dump(frozen, sort_keys=False, allow_unicode=True)
        write_atomically(folder / CONFIG, text.encode(), private=True)
    load_config(folder / CONFIG)
    try:
        yield
    except client.UnclearError:
        raise  # a job may have them
    except UsageError:
        for name in frozen_files:
            shutil.copy2(kept / name, folder / name)
        shutil.rmtree(kept)
        raise


def _copy_field(source: dict[str, Any], target: dict[str, Any], keys: Sequence[str]) -> None:
    value = reduce(lambda tree, key: tree[key], keys, source)
    section = reduce(lambda tree, key: tree.setdefault(key, {}), keys[:-1], target)
    section[keys[-1]] = value
