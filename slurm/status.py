"""`biroute status`: the state of a run, from its folder and from Slurm if Slurm answers. No torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from biroute.configs.errors import EXIT_OK, UsageError
from biroute.launcher.attempts.journal import Attempt, read_attempts
from biroute.launcher.track.progress_line import duration, with_prefix
from biroute.launcher.track.uploader import values_waiting
from biroute.slurm.client import Job, past_jobs
from biroute.slurm.run_folder import RunFolder


@dataclass(frozen=True)
class RunStatus:
    """What `biroute status` shows about one run; a field is None if its value is not known."""

    run: str
    run_dir: str
    state: str  # queued, starting, running, ending, finished, stopped, cancelled, lost, unknown
    reason: str
    step: int | None
    steps: int | None
    tokens_per_second: float | None
    seconds_left: float | None
    values_waiting: int  # for MLflow
    jobs: tuple[Job, ...]  # the queued and running ones; if there are none, the last one if Slurm still knows it
    attempts: tuple[Attempt, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the status as plain values."""
        tree = asdict(self)
        for job in tree["jobs"]:
            job["script"] = str(job["script"]) if job["script"] else None
        return tree


def status_of(run: RunFolder, queue: list[Job] | None) -> RunStatus:
    """Determine the status of a run.

    Args:
        run: the run.
        queue: this user's jobs; None if Slurm is not available or does not answer.
    """
    attempts = read_attempts(run.path)
    stranger = run.stranger()
    live = [] if queue is None else run.jobs_in(queue) if stranger is None else _jobs_of_stranger(run)
    state, reason = run_state(live if queue is not None else None, attempts, cancelled=run.cancelled_mark.exists())
    if stranger is not None:
        reason = f"a run of {stranger[1]}" + (f"; {reason}" if reason else "")
    config, point = run.config(), run.last_point()
    steps = config.train.steps if config else None
    metrics = point.metrics if point else {}
    rate, step_seconds = metrics.get("throughput/tokens_per_second"), metrics.get("time/step_seconds")
    left = max(0, steps - point.step) * step_seconds if point and steps and step_seconds is not None else None
    ids = run.job_ids()
    return RunStatus(
        run=run.name,
        run_dir=str(run.path),
        state=state,
        reason=reason,
        step=point.step if point else None,
        steps=steps,
        tokens_per_second=rate,
        seconds_left=left,
        values_waiting=values_waiting(run.path),
        jobs=tuple(live or past_jobs(ids[-1:])),
        attempts=tuple(attempts),
    )


def _jobs_of_stranger(run: RunFolder) -> list[Job]:
    try:
        return run.jobs()
    except UsageError:
        return []


def run_state(live: Sequence[Job] | None, attempts: Sequence[Attempt], *, cancelled: bool) -> tuple[str, str]:
    """Determine the state of a run.

    Args:
        live: the run's queued and running jobs; None if Slurm does not answer.
        attempts: the run's attempts, oldest first.
        cancelled: whether the run was cancelled.

    Returns:
        The state in one word, as in `RunStatus.state`, and the reason for it, which may be empty.
    """
    last = attempts[-1] if attempts else None
    if live:
        job = live[0]
        if job.state == "PENDING":
            return "queued", "" if job.reason == "None" else job.reason
        if job.state != "RUNNING":
            return "ending", job.state.lower()
        return ("running", "") if last is not None and last.ended is None else ("starting", "")
    if last is not None and last.ended is not None and (last.decision == "finished" or last.status == EXIT_OK):
        return "finished", ""
    if cancelled:
        return "cancelled", "`biroute resume` continues it"
    if live is None and (last is None or last.ended is None or last.decision == "requeue"):
        return "unknown", "Slurm does not answer here"
    if last is None:
        return "lost", "none of its jobs is queued, and none has begun; see slurm-*.out in its logs folder"
    if last.ended is None:
        if last.job is None:
            return "running", "started without Slurm, so it is not known whether it still runs"
        return "lost", "its job disappeared without recording an end; `biroute resume` continues it"
    if last.decision == "requeue":
        return "lost", "it should have been queued again but was not; `biroute resume` continues it"
    return "stopped", last.cause


def format_status(status: RunStatus) -> str:
    """Format the status as lines for the terminal."""
    facts = [status.state + (f" ({status.reason})" if status.reason else "")]
    if status.step is not None:
        facts.append(f"step {status.step}" + (f" of {status.steps}" if status.steps else ""))
    if status.state == "running":
        if status.tokens_per_second is not None:
            facts.append(f"{with_prefix(status.tokens_per_second)} tokens/s")
        if status.seconds_left is not None:
            facts.append(f"{duration(status.seconds_left)} left")
    lines = [f"run {status.run}: {', '.join(facts)}", f"  folder {status.run_dir}"]
    for job in status.jobs:
        words = [f"  job {job.job_id} {job.state}"]
        if job.nodes:
            words.append(f"on {job.nodes}")
        if job.state == "RUNNING" and job.time_left:
            words.append(f"{job.time_left} to its time limit")
        lines.append(", ".join(words))
    lines += [f"  {_tell_attempt(attempt)}" for attempt in status.attempts]
    if status.values_waiting and status.state not in ("running", "ending"):  # a running one sends them itself
        lines.append(f"  {status.values_waiting} values wait for MLflow: `biroute track sync {status.run_dir}`")
    return "\n".join(lines)


def _tell_attempt(attempt: Attempt) -> str:
    where = f", job {attempt.job}" if attempt.job else ""
    nodes = f" on {', '.join(attempt.nodes)}" if attempt.nodes else ""
    began = time.strftime("%F %T", time.localtime(attempt.began))
    if attempt.ended is None:
        return f"attempt {attempt.number}{where}{nodes}, since {began}"
    lasted = duration(attempt.ended - attempt.began)
    decided = f" -> {attempt.decision}" if attempt.decision else ""
    return f"attempt {attempt.number}{where}{nodes}, {began}, {lasted}: {attempt.cause}{decided}"
