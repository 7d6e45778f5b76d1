"""`biroute logs`: the cause of a failure, then the ranks' output, across the attempts of a run. No torch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from biroute.configs.errors import UsageError
from biroute.configs.files import open_regular
from biroute.configs.records import last_lines
from biroute.launcher.attempts.failures import bad_nodes, format_first_failure, log_file
from biroute.launcher.attempts.journal import Attempt, read_attempts
from biroute.launcher.attempts.run_files import LOGS, log_dir
from biroute.slurm import client
from biroute.slurm.reasons import why_it_waits
from biroute.slurm.run_folder import RunFolder
from biroute.slurm.status import status_of

_POLL_SECONDS = 0.5
_QUEUE_SECONDS = 10.0  # between two queries to the controller


def format_logs(run: RunFolder, attempt: int | None, rank: int, lines: int) -> str:
    """Format an attempt's first failure, if there is one, and the last lines that a rank printed.

    Args:
        run: the run.
        attempt: number of the attempt; None for the newest.
        rank: rank whose log is shown.
        lines: number of lines to show.

    Raises:
        UsageError: there is no such attempt, or nothing was printed.
    """
    found = _attempt(run, attempt)
    if found is None:
        output = _job_output(run)
        if output is None:
            raise UsageError(f"run {run.name} has no logs yet: no attempt of it has begun")
        return _last_lines(output, lines)
    logs = log_dir(run.path, found.number)
    if found.world_size and rank >= found.world_size:
        raise UsageError(f"--rank {rank}: attempt {found.number} has {found.world_size} ranks, numbered from 0")
    parts = [_heading(found)]
    failure = format_first_failure(logs) if found.crash else ""
    if failure:
        parts += ["first failure:", failure]
    path = log_file(logs, rank)
    if path.exists():
        parts.append(_last_lines(path, lines))
    elif not failure:
        output = _job_output(run)
        parts.append(_last_lines(output, lines) if output else f"{path}: not there (yet)")
    return "\n".join(parts)


def format_preflight(run: RunFolder, attempt: int | None, lines: int) -> str:
    """Format what the check of the nodes found and printed before an attempt.

    Raises:
        UsageError: there is no such attempt, or no check began.
    """
    found = _attempt(run, attempt)
    logs = log_dir(run.path, found.number) if found is not None else None
    outputs = sorted(logs.glob("preflight-*.log")) if logs is not None else []
    if found is None or logs is None or not outputs:
        raise UsageError(f"run {run.name} has no log of a check of its nodes")
    parts = [_heading(found)]
    parts += [f"node {node}: {'; '.join(problems)}" for node, problems in bad_nodes(logs).items()]
    parts += [_last_lines(path, lines) for path in outputs]
    return "\n".join(parts)


def format_job_output(run: RunFolder, lines: int) -> str:
    """Format the last lines that the batch script of the newest job printed.

    Raises:
        UsageError: none has begun.
    """
    output = _job_output(run)
    if output is None:
        raise UsageError(f"run {run.name} has no output of a job yet: none has begun")
    return _last_lines(output, lines)


def follow_logs(run: RunFolder, rank: int, lines: int, say: Callable[[str], None]) -> None:
    """Follow the output of a rank from one attempt to the next until the run is over.

    Args:
        run: the run.
        rank: rank whose log is followed.
        lines: number of past lines to begin with.
        say: called with each piece of output.
    """
    queue = _QueueWatch(run)
    number = 0
    if _attempt(run, None) is None and (waiting := _waiting(run)):
        say(waiting)
    while (attempt := _next_attempt(run, number, queue)) is not None:
        say(_heading(attempt))
        _follow_attempt(run, attempt, rank, lines if number == 0 else None, queue, say)
        number = attempt.number
    say(f"run {run.name}: {status_of(run, []).state}")


def _waiting(run: RunFolder) -> str:
    """Say what a run without an attempt waits for; "" if it has no job."""
    with contextlib.suppress(UsageError):
        for job in run.jobs():
            why = why_it_waits(job.reason, job.begins, job.job_id)
            begun = f"job {job.job_id} is {job.state.lower()}"
            return f"{begun}{': ' if why else ''}{why}; nothing is printed before it begins"
    return ""


class _QueueWatch:
    """Checks periodically whether the run has a job; assumes that it has one while the controller does not answer."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._asked = -_QUEUE_SECONDS
        self._live = True

    def live(self) -> bool:
        if self._live and time.monotonic() - self._asked > _QUEUE_SECONDS:
            self._asked = time.monotonic()
            with contextlib.suppress(UsageError):
                self._live = bool(self._run.jobs_in(client.queue()))
        return self._live


def _next_attempt(run: RunFolder, number: int, queue: _QueueWatch) -> Attempt | None:
    """Wait for an attempt later than `number`; None if the run ends without one."""
    while True:
        newest = _attempt(run, None)
        if newest is not None and newest.number > number:
            return newest
        over = newest is not None and newest.ended is not None and newest.decision in ("finished", "stop", None)
        if over or not queue.live():
            return None
        time.sleep(_POLL_SECONDS)


def _follow_attempt(
    run: RunFolder, attempt: Attempt, rank: int, lines: int | None, queue: _QueueWatch, say: Callable[[str], None]
) -> None:
    """Follow the log of one attempt until it has ended, then report why; start with the last `lines` (None: all)."""
    logs = log_dir(run.path, attempt.number)
    position = 0
    while True:
        newest = _attempt(run, None)
        this = _attempt(run, attempt.number) or attempt
        ended = this.ended is not None or (newest is not None and newest.number > attempt.number)
        over = ended or (attempt.job is not None and not queue.live())  # checked before the log is read once more
        text, position = _read_from(log_file(logs, rank), position)
        if text:
            say(text if lines is None else "\n".join(text.splitlines()[-lines:]))
            lines = None
        elif over:
            break
        else:
            time.sleep(_POLL_SECONDS)
    if this.crash and (failure := format_first_failure(logs)):
        say(f"first failure:\n{failure}")
    if this.ended is not None:
        say(f"attempt {this.number} ended: {this.cause}" + (f" -> {this.decision}" if this.decision else ""))


def _read_from(path: Path, position: int) -> tuple[str, int]:
    """Return the complete lines after byte `position`, and the position where they end."""
    try:
        with open_regular(path) as file:
            file.seek(position)
            data = file.read()
    except OSError:
        return "", position
    whole = data[: data.rfind(b"\n") + 1]
    return whole.decode("utf-8", errors="replace").rstrip("\n"), position + len(whole)


def _attempt(run: RunFolder, number: int | None) -> Attempt | None:
    """Return the attempt with that number, or the newest one (None if there is none yet) if no number is given."""
    attempts = read_attempts(run.path)
    if number is None:
        return attempts[-1] if attempts else None
    found = next((attempt for attempt in attempts if attempt.number == number), None)
    if found is None:
        known = ", ".join(str(attempt.number) for attempt in attempts) or "none"
        raise UsageError(f"run {run.name} has no attempt {number}; it has {known}")
    return found


def _heading(attempt: Attempt) -> str:
    nodes = f" on {', '.join(attempt.nodes)}" if attempt.nodes else ""
    job = f", job {attempt.job}" if attempt.job else ""
    return f"==> attempt {attempt.number}{job}{nodes} <=="


def _job_output(run: RunFolder) -> Path | None:
    """Return the file with the output of the newest job's script; None if there is none."""
    outputs = sorted((run.path / LOGS).glob("slurm-*.out"), key=lambda path: path.stat().st_mtime)
    return outputs[-1] if outputs else None


def _last_lines(path: Path, lines: int) -> str:
    return "\n".join([f"last lines of {path}:", *last_lines(path, lines)])
