"""`biroute status` for people: a table of several runs, or one run with its jobs and attempts. No torch."""

from __future__ import annotations

import time
from collections.abc import Sequence

from biroute.launcher.attempts.journal import Attempt
from biroute.launcher.track.progress_line import duration, with_prefix
from biroute.slurm.client import Job
from biroute.slurm.status import RunStatus

_HEAD = ("RUN", "STATE", "STEP", "TOKENS/S", "LEFT", "JOB", "SINCE", "WHY")
_SENDS_ITSELF = ("queued", "starting", "running", "ending")


def format_table(statuses: Sequence[RunStatus], width: int | None = None) -> str:
    """Format a line for each run; `width` is that of the terminal in columns, None for unlimited lines."""
    rows = [_HEAD, *map(_row, statuses)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD) - 1)]
    lines = []
    for row in rows:
        line = "  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=False)) + f"  {row[-1]}"
        line = line.rstrip()
        lines.append(line if width is None or len(line) <= width else line[: width - 1] + "\u2026")
    return "\n".join(lines)


def format_status(status: RunStatus) -> str:
    """Format everything about one run."""
    facts = [status.state + (f" ({status.reason})" if status.reason else "")]
    if status.since is not None:
        facts.append(f"since {_clock(status.since)}")
    if status.step is not None:
        facts.append(f"step {status.step}" + (f" of {status.steps}" if status.steps else ""))
    if status.state == "running":
        if status.tokens_per_second is not None:
            facts.append(f"{with_prefix(status.tokens_per_second)} tokens/s")
        if status.seconds_left is not None:
            facts.append(f"{duration(status.seconds_left)} left")
    lines = [f"run {status.run}: {', '.join(facts)}", f"  folder {status.run_dir}"]
    lines += [_tell_job(job, "job") for job in status.jobs]
    lines += [_tell_job(job, "evaluation job") for job in status.evaluations]
    lines += [f"  {_tell_attempt(attempt)}" for attempt in status.attempts]
    lines += [f"  {line}" for line in status.left_nodes]
    if status.values_waiting and status.state not in _SENDS_ITSELF:
        lines.append(f"  {status.values_waiting} values wait for MLflow: `biroute track sync {status.run_dir}`")
    return "\n".join(lines)


def _tell_job(job: Job, kind: str) -> str:
    words = [f"  {kind} {job.job_id} {job.state}"]
    if job.nodes:
        words.append(f"on {job.nodes}")
    if job.state == "RUNNING" and job.time_left:
        words.append(f"{job.time_left} to its time limit")
    if job.note:
        words.append(job.note)
    return ", ".join(words)


def _row(status: RunStatus) -> tuple[str, ...]:
    running = status.state == "running"
    rate, left = status.tokens_per_second, status.seconds_left
    why = status.reason
    if not why and status.values_waiting and status.state not in _SENDS_ITSELF:
        why = f"{status.values_waiting} values wait for MLflow"
    return (
        status.run,
        status.state,
        "" if status.step is None else f"{status.step}" + (f"/{status.steps}" if status.steps else ""),
        with_prefix(rate) if running and rate is not None else "",
        duration(left) if running and left is not None else "",
        status.jobs[0].job_id if status.jobs else "",
        "" if status.since is None else _clock(status.since)[:-3],  # to the minute
        " ".join(why.split()),
    )


def _clock(seconds: float) -> str:
    return time.strftime("%F %T", time.localtime(seconds))


def _tell_attempt(attempt: Attempt) -> str:
    where = f", job {attempt.job}" if attempt.job else ""
    nodes = f" on {', '.join(attempt.nodes)}" if attempt.nodes else ""
    began = _clock(attempt.began)
    if attempt.ended is None:
        return f"attempt {attempt.number}{where}{nodes}, since {began}"
    lasted = duration(attempt.ended - attempt.began)
    decided = f" -> {attempt.decision}" if attempt.decision else ""
    return f"attempt {attempt.number}{where}{nodes}, {began}, {lasted}: {attempt.cause}{decided}"
