"""`biroute status`: the state of runs, from their folders and from Slurm if Slurm answers. No torch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from biroute.configs.errors import EXIT_OK, UsageError
from biroute.launcher.attempts.failures import seconds_since_heartbeat
from biroute.launcher.attempts.journal import Attempt, read_attempts
from biroute.launcher.attempts.run_files import log_dir
from biroute.launcher.track.progress_line import duration
from biroute.launcher.track.uploader import values_waiting
from biroute.slurm import client
from biroute.slurm.client import Job
from biroute.slurm.reasons import why_it_waits
from biroute.slurm.run_folder import RunFolder

STATES = (
    "queued", "starting", "running", "ending", "finished", "stopped", "cancelled", "failed", "lost", "unknown",
)  # fmt: skip
RESUME = "`biroute resume` continues it"
_ALIVE_SECONDS = 120.0  # since a heartbeat; ranks write one every few seconds


@dataclass(frozen=True)
class RunStatus:
    """What `biroute status` shows about one run; a field is None if its value is not known."""

    run: str
    run_dir: str
    state: str  # one of STATES
    reason: str
    since: float | None  # Unix seconds at which the state began
    step: int | None
    steps: int | None
    tokens_per_second: float | None
    seconds_left: float | None
    values_waiting: int  # for MLflow
    jobs: tuple[Job, ...]  # the queued and running ones; if there are none, the last one if Slurm still knows it
    attempts: tuple[Attempt, ...]
    evaluations: tuple[Job, ...]  # queued and running jobs that evaluate its checkpoints
    left_nodes: tuple[str, ...]  # lines that say which nodes a job had to leave before an attempt could begin there

    def as_json(self) -> dict[str, Any]:
        """Return the status as plain values."""
        tree = asdict(self)
        for job in [*tree["jobs"], *tree["evaluations"]]:
            job["script"] = str(job["script"]) if job["script"] else None
        return tree


def survey(runs: Sequence[RunFolder], queue: list[Job] | None) -> tuple[list[RunStatus], list[str]]:
    """Determine the status of several runs, newest first, with one question to the accounting database.

    Args:
        runs: the runs.
        queue: this user's jobs; None if Slurm is not available or does not answer.

    Returns:
        The statuses, and a line for each run folder that cannot be read.
    """
    found, unreadable = [], []
    jobs: list[tuple[RunFolder, list[Job], list[str]]] = []  # its jobs in the queue; if there are none, its last one
    for run in runs:
        try:
            live = _live_jobs(run, queue)
            jobs.append((run, live, [] if live else run.job_ids()[-1:]))
        except (OSError, UsageError) as error:  # one bad folder must not hide the others
            unreadable.append(_unreadable(run, error))
    past = _past_jobs([job_id for _, _, ids in jobs for job_id in ids], queue is not None)
    for run, live, ids in jobs:
        try:
            last_job = past.get(ids[0]) if ids else None
            found.append(_status(run, None if queue is None else live, last_job, queue))
        except (OSError, UsageError) as error:
            unreadable.append(_unreadable(run, error))
    return sorted(found, key=lambda status: -(status.since or 0.0)), unreadable


def status_of(run: RunFolder, queue: list[Job] | None) -> RunStatus:
    """Determine the status of a run; `queue` are this user's jobs, None if Slurm does not answer.

    Raises:
        OSError, UsageError: the folder cannot be read.
    """
    live = _live_jobs(run, queue)
    past = {} if live else _past_jobs(run.job_ids()[-1:], queue is not None)
    return _status(run, None if queue is None else live, next(iter(past.values()), None), queue)


def _unreadable(run: RunFolder, error: Exception) -> str:
    return f"run {run.name}: {run.path} cannot be read ({' '.join(str(error).split())})"


def _live_jobs(run: RunFolder, queue: list[Job] | None) -> list[Job]:
    if queue is None:
        return []
    if run.stranger() is None:
        return run.jobs_in(queue)
    with contextlib.suppress(UsageError):
        return run.jobs()
    return []


def _past_jobs(job_ids: Sequence[str], slurm_answers: bool) -> dict[str, Job]:
    """Ask for jobs that are not in the queue: the accounting database, or for a single one the controller."""
    if not job_ids or not slurm_answers:
        return {}
    found = {job.job_id: job for job in client.past_jobs(job_ids)}
    if not found and len(job_ids) == 1:
        with contextlib.suppress(UsageError):
            job = client.find_job(job_ids[0])
            found = {job.job_id: job} if job is not None else {}
    return found


def _status(run: RunFolder, live: list[Job] | None, last_job: Job | None, queue: list[Job] | None) -> RunStatus:
    attempts = read_attempts(run.path)
    state, reason = run_state(live, attempts, cancelled=run.cancelled_mark.exists(), last_job=last_job)
    if state == "running" and live is None and attempts[-1].job is None:
        state, reason = _without_slurm(run, attempts[-1])
    stranger = run.stranger()
    if live and stranger is None:
        reason = _told_missing(run, live[0]) or reason
    if stranger is not None:
        reason = f"a run of {stranger[1]}" + (f"; {reason}" if reason else "")
    config, point = run.config(), run.last_point()
    steps = config.train.steps if config else None
    metrics = point.metrics if point else {}
    step_seconds = metrics.get("time/step_seconds")
    left = max(0, steps - point.step) * step_seconds if point and steps and step_seconds is not None else None
    return RunStatus(
        run=run.name,
        run_dir=str(run.path),
        state=state,
        reason=reason,
        since=_since(state, live or [], attempts, run),
        step=point.step if point else None,
        steps=steps,
        tokens_per_second=metrics.get("throughput/tokens_per_second"),
        seconds_left=left,
        values_waiting=values_waiting(run.path),
        jobs=tuple(live or ([last_job] if last_job is not None else [])),
        attempts=tuple(attempts),
        evaluations=tuple(run.evaluations_in(queue or []) if stranger is None else []),
        left_nodes=tuple(run.left_nodes()),
    )


def _told_missing(run: RunFolder, job: Job) -> str:
    """Say what a job does not find any more, so that it ends; "" if all is there."""
    missing = run.missing()
    if missing is None and job.script is not None and not job.script.parent.exists():
        missing = job.script.parent.parent  # known by its number: the folder was moved here
    if missing is None:
        return ""
    ends = "when it begins" if job.state == "PENDING" else "for good at its next stop"
    return f"{missing} was deleted or moved: job {job.job_id} ends {ends}; `scancel {job.job_id}` ends it now"


def run_state(
    live: Sequence[Job] | None, attempts: Sequence[Attempt], *, cancelled: bool, last_job: Job | None = None
) -> tuple[str, str]:
    """Determine the state of a run.

    Args:
        live: the run's queued and running jobs; None if Slurm does not answer.
        attempts: the run's attempts, oldest first.
        cancelled: whether the run was cancelled.
        last_job: what Slurm says of its last job, if none is queued or running and Slurm still knows it.

    Returns:
        The state in one word, as in `RunStatus.state`, and the reason for it, which may be empty.
    """
    last = attempts[-1] if attempts else None
    if live:
        job = live[0]
        if job.state == "PENDING":
            return "queued", why_it_waits(job.reason, job.begins, job.job_id)
        if job.state != "RUNNING":
            return "ending", job.state.lower()
        return ("running", "") if last is not None and last.ended is None else ("starting", "")
    if last is not None and last.ended is not None and (last.decision == "finished" or last.status == EXIT_OK):
        return "finished", ""
    if cancelled:
        return "cancelled", RESUME
    return _state_without_job(live is not None, last, last_job)


def _state_without_job(slurm_answers: bool, last: Attempt | None, job: Job | None) -> tuple[str, str]:
    """Determine the state of a run that is neither finished nor cancelled and has no job."""
    if last is not None and last.job is None and last.ended is None:
        return "running", "started without Slurm, so it is not known whether it still runs"
    if not slurm_answers and (last is None or last.ended is None or last.decision == "requeue"):
        return "unknown", "Slurm does not answer here"
    ended = f"job {job.job_id} ended as {_ending(job)}" if job is not None and not job.live else ""
    if ended and job is not None and job.note:
        return "failed", f"{ended}: {job.note}"
    if ended and job is not None and job.state.startswith("CANCELLED") and (last is None or last.ended is None):
        return "cancelled", f"{ended}; {RESUME}"
    if last is None:
        if ended:
            return "failed", (
                f"{ended}, before its script could record anything: that node may not see the run folder; exclude it "
                f"by slurm's sbatch_options, then `biroute resume`"
            )
        return "lost", "none of its jobs is queued, and none has begun; see slurm-*.out in its logs folder"
    if last.ended is None:
        return "lost", f"{ended or 'its job disappeared'} without recording an end; {RESUME}"
    if last.decision == "requeue":
        return "lost", f"it should have been queued again but was not{f' ({ended})' if ended else ''}; {RESUME}"
    return "stopped", last.cause


def _ending(job: Job) -> str:
    code = f", exit code {job.exit_code}" if job.exit_code not in ("", "0:0") else ""
    return f"{job.state}{code}" + (f" on {job.nodes}" if job.nodes else "")


def _without_slurm(run: RunFolder, last: Attempt) -> tuple[str, str]:
    """Tell by its heartbeats whether a run that `biroute train` started still runs."""
    silent = seconds_since_heartbeat(log_dir(run.path, last.number))
    silent = time.time() - last.began if silent is None else silent
    if silent < _ALIVE_SECONDS:
        return "running", ""
    return "lost", f"no sign of life for {duration(silent)}; run its `biroute train` command again"


def _since(state: str, live: Sequence[Job], attempts: Sequence[Attempt], run: RunFolder) -> float | None:
    """Return when the state began, as far as it is known; otherwise when the folder last changed."""
    if state == "queued" and (submitted := _unix(live[0].submitted)) is not None:
        return submitted
    if attempts:
        last = attempts[-1]
        return last.began if last.ended is None else last.ended
    with contextlib.suppress(OSError):
        return run.path.stat().st_mtime
    return None


def _unix(local: str) -> float | None:
    with contextlib.suppress(ValueError):
        return datetime.fromisoformat(local).timestamp()
    return None


def among(statuses: Iterable[RunStatus], states: Sequence[str]) -> list[RunStatus]:
    """Return those in one of `states`, or all if none is given.

    Raises:
        UsageError: there is no such state.
    """
    if wrong := [state for state in states if state not in STATES]:
        raise UsageError(f"--state {wrong[0]}: no such state; choose of {', '.join(STATES)}")
    return [status for status in statuses if not states or status.state in states]
