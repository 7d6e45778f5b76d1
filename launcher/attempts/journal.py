"""The attempt journal and the fencing token of a run, and the decision whether another attempt follows. No torch.

    <run>/attempts.jsonl           one line when an attempt begins, one when it ends; only ever appended to
    <run>/attempt                  the fencing token: number of the attempt that owns the folder
    <run>/logs/attempt-0001/       what its ranks wrote

A rank on a node that the scheduler has given up may continue training for minutes while the next attempt runs
elsewhere. It must not write into the folder any more, so every writer first compares its number with the fencing
token.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from biroute.configs.errors import EXIT_OK, EXIT_STOPPED, EXIT_USAGE_ERROR, FencedError, UsageError
from biroute.configs.files import append_file, file_lock, try_writing, write_atomically
from biroute.configs.records import UnixSeconds, parse_json, read_small, record_of
from biroute.launcher.attempts.failures import End, last_step
from biroute.launcher.attempts.run_files import (
    CANCELLED,
    CHECKPOINTS,
    FENCING_TOKEN,
    JOURNAL,
    LOGS,
    SUBMISSION,
    log_dir,
)

CANCELLED_MARK = Path(SUBMISSION) / CANCELLED
NO_END = "no end recorded: its node was lost or the job killed"
ATTEMPT_VARIABLE = "BIROUTE_ATTEMPT"  # its number, for ranks whose launcher has begun the attempt
_LOCK_SECONDS = 10.0  # a lost node may hold the lock forever

Decision = Literal["requeue", "stop", "finished"]


@dataclass(frozen=True)
class Attempt:
    """One start of a run. `ended` and the fields after it are set when it ends; times are Unix seconds."""

    number: int
    began: UnixSeconds
    job: str | None = None  # Slurm's job id
    restart: int = 0  # Slurm's count of restarts of that job
    nodes: tuple[str, ...] = ()
    world_size: int = 0
    ended: UnixSeconds | None = None
    status: int | None = None
    cause: str = ""
    step: int | None = None  # last step that it is known to have reached
    crash: bool = False  # whether it counts towards the limits on restarts
    decision: Decision | None = None  # None without a scheduler: the user starts the run again
    excluded: tuple[str, ...] = ()  # nodes that must not be used again


@dataclass(frozen=True)
class Limits:
    """Limits on restarts after crashes of one job, and whether to restart at all; fields of section slurm."""

    max_restarts: int
    max_crashes_at_same_step: int
    requeue: bool = True
    max_restarts_without_progress: int = 20


def make_run_dir(path: Path) -> None:
    """Create the run folder.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        try_writing(path)
    except OSError as error:
        raise UsageError(f"train.run_dir={path}: {error.strerror}; use a folder that can be written") from None
    for part in (path / CHECKPOINTS, path / LOGS):
        try:
            if part.exists():  # said now, and not after the steps before the first save
                try_writing(part)
        except OSError as error:
            raise UsageError(
                f"{part}: nothing can be written there ({error.strerror}); make it a folder that can be written, or "
                "set train.run_dir to another one"
            ) from None


def begin_attempt(
    run_dir: Path,
    *,
    nodes: Sequence[str],
    world_size: int,
    job: str | None = None,
    restart: int = 0,
) -> int:
    """Take over the run folder; writes of earlier attempts are refused after that.

    Returns:
        The number of the new attempt.

    Raises:
        UsageError: the folder cannot be written.
    """
    try:
        with folder_lock(run_dir):
            attempts = read_attempts(run_dir)
            number = max([fencing_token_of(run_dir), *(attempt.number for attempt in attempts)]) + 1
            _raise_fence(run_dir, number)
            for attempt in attempts:
                if attempt.ended is None:
                    _append_end(
                        run_dir, attempt.number, End(-1, NO_END, last_step(log_dir(run_dir, attempt.number))), None
                    )
            begin = {"attempt": number, "event": "begin", "time": time.time(), "job": job, "restart": restart}
            _append(run_dir, begin | {"nodes": list(nodes), "world_size": world_size})
        log_dir(run_dir, number).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"train.run_dir={run_dir}: {error.strerror}; use a folder that can be written") from None
    return number


def given_attempt() -> int | None:
    """Return the attempt that this rank's launcher has begun; None if it begins none, such as torchrun.

    Raises:
        UsageError: the variable is not a number.
    """
    text = os.environ.get(ATTEMPT_VARIABLE, "")
    if text and not text.isdecimal():
        raise UsageError(f"{ATTEMPT_VARIABLE}={text!r} is not the number of an attempt; unset it")
    return int(text) if text else None


def end_attempt(run_dir: Path, number: int, end: End, limits: Limits | None) -> tuple[Decision | None, str]:
    """Record how attempt `number` ended, unless its end is already recorded.

    `limits` is None where no scheduler could start the run again.

    Returns:
        The decision whether the job is queued again (None without `limits`), and its reason in words.
    """
    with folder_lock(run_dir):
        owner = fencing_token_of(run_dir)
        if owner != number:
            return "stop", f"attempt {number} no longer owns {run_dir}: attempt {owner} does"
        attempts = read_attempts(run_dir)
        this = next((attempt for attempt in attempts if attempt.number == number), Attempt(number, time.time()))
        if this.ended is not None:
            return this.decision, this.cause
        decision: Decision | None = None
        reason = ""
        if limits is not None:
            earlier = [attempt for attempt in attempts if attempt.number < number and attempt.job == this.job]
            cancelled = (run_dir / CANCELLED_MARK).exists()
            decision, reason = decide(end, earlier, cancelled=cancelled, limits=limits)
        _append_end(run_dir, number, end, decision)
    return decision, reason


def decide(end: End, earlier: Sequence[Attempt], *, cancelled: bool, limits: Limits) -> tuple[Decision, str]:
    """Decide whether the job is queued again after `end`; `earlier` are the previous attempts of the same job.

    Returns:
        The decision, and its reason in words.
    """
    if end.status == EXIT_OK:
        return "finished", "the run is at its last step"
    if cancelled:
        return "stop", "the run was cancelled; `biroute resume` continues it"
    if end.status == EXIT_USAGE_ERROR:
        return "stop", f"{end.cause}; fix it, then `biroute resume`"
    if not limits.requeue:
        return "stop", f"{end.cause}; slurm.requeue is off: `biroute resume` continues it"
    stalled = 1 + _without_progress(end, earlier)
    if stalled >= limits.max_restarts_without_progress:
        return "stop", (
            f"{stalled} attempts in a row made no step (slurm.max_restarts_without_progress="
            f"{limits.max_restarts_without_progress}), last cause: {end.cause}; is the time limit shorter than the "
            "start? then `biroute resume`"
        )
    if end.status == EXIT_STOPPED or not end.crash:
        return "requeue", f"{end.cause}; the next attempt resumes from there"
    crashes = [attempt for attempt in earlier if attempt.crash]
    same_step = 1 + sum(attempt.step == end.step for attempt in crashes)
    if same_step >= limits.max_crashes_at_same_step and not end.excluded:  # without these nodes it may work
        where = "before the first step" if end.step is None else f"after step {end.step}"
        return "stop", (
            f"crash loop: {same_step} attempts ended {where} (slurm.max_crashes_at_same_step="
            f"{limits.max_crashes_at_same_step}), last cause: {end.cause}; fix it, then `biroute resume`"
        )
    if len(crashes) >= limits.max_restarts:
        return "stop", (
            f"{len(crashes) + 1} attempts crashed, last cause: {end.cause}; slurm.max_restarts="
            f"{limits.max_restarts} allows no further one; fix it, then `biroute resume`"
        )
    return "requeue", f"crash {len(crashes) + 1} of at most {limits.max_restarts + 1}: {end.cause}"


def _without_progress(end: End, earlier: Sequence[Attempt]) -> int:
    """Count the attempts just before this one that came at least as far as it did."""
    count = 0
    for attempt in reversed(earlier):
        if (attempt.step or 0) < (end.step or 0):
            break
        count += 1
    return count


def read_attempts(run_dir: Path) -> list[Attempt]:
    """Read all attempts in order; empty if there are none. Damaged lines are skipped.

    Raises:
        OSError: the journal exists and cannot be read.
    """
    attempts: dict[int, Attempt] = {}
    for record in _records(run_dir / JOURNAL):
        with contextlib.suppress(KeyError, TypeError, ValueError):
            _take_in(attempts, record)
    return [attempts[number] for number in sorted(attempts)]


def excluded_nodes(run_dir: Path, job: str | None) -> list[str]:
    """Return the nodes that attempts of `job` found to be bad."""
    return sorted({node for attempt in read_attempts(run_dir) if attempt.job == job for node in attempt.excluded})


def fencing_token_of(run_dir: Path) -> int:
    """Read the fencing token: the number of the attempt that owns the folder, or 0 if none does.

    Raises:
        UsageError: the token is not a number.
    """
    try:
        return int(read_small(run_dir / FENCING_TOKEN))
    except FileNotFoundError:
        return 0
    except ValueError:
        raise UsageError(f"{run_dir / FENCING_TOKEN}: not a number; write the newest number in {JOURNAL}") from None


@dataclass(frozen=True)
class FencingToken:
    """The right of one attempt to write into the run folder."""

    run_dir: Path
    attempt: int

    def holds(self) -> bool:
        """Return whether this attempt may write; also True if the token is unreadable: the write itself will fail."""
        try:
            return fencing_token_of(self.run_dir) <= self.attempt
        except (OSError, UsageError):
            return True

    def check(self) -> None:
        """Check that this attempt may still write.

        Raises:
            FencedError: another attempt owns the folder.
        """
        if not self.holds():
            raise FencedError(
                f"attempt {self.attempt} no longer owns {self.run_dir}: attempt {fencing_token_of(self.run_dir)} "
                "does; nothing more is written"
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder's lock around a change that must not overlap with the start of the next attempt.

        Raises:
            FencedError: another attempt owns the folder.
        """
        with folder_lock(self.run_dir):
            self.check()
            yield


def folder_lock(run_dir: Path) -> AbstractContextManager[None]:
    """Let only one process at a time change the fencing token, the journal or the list of checkpoints.

    After some seconds the caller continues without the lock: a frozen holder must not block the next attempt.
    """
    return file_lock(run_dir / f".{FENCING_TOKEN}.lock", _LOCK_SECONDS)


def _raise_fence(run_dir: Path, number: int) -> None:
    write_atomically(run_dir / FENCING_TOKEN, f"{number}\n".encode("ascii"))


def _append_end(run_dir: Path, number: int, end: End, decision: Decision | None) -> None:
    record = {"attempt": number, "event": "end", "time": time.time(), "status": end.status, "cause": end.cause}
    record |= {"step": end.step, "crash": end.crash, "decision": decision, "excluded": list(end.excluded)}
    _append(run_dir, record)


def _append(run_dir: Path, record: dict[str, Any]) -> None:
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    with append_file(run_dir / JOURNAL) as file:
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # torn by a kill
                line = b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _records(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = read_small(path).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return
    except ValueError as error:
        raise UsageError(f"{error}; no journal of a run is so large") from None
    for line in lines:
        with contextlib.suppress(ValueError):
            record = parse_json(line)
            if isinstance(record, dict):
                yield record


def _take_in(attempts: dict[int, Attempt], record: dict[str, Any]) -> None:
    number = int(record["attempt"])
    names = ("job", "restart", "nodes", "world_size", "status", "cause", "step", "crash", "decision", "excluded")
    fields = {name: record[name] for name in names if name in record}
    if record["event"] == "begin":
        attempts[number] = record_of(Attempt, fields | {"number": number, "began": record["time"]})
    elif record["event"] == "end" and number in attempts and attempts[number].ended is None:
        ended = asdict(attempts[number]) | fields | {"ended": record["time"], "cause": record["cause"]}
        attempts[number] = record_of(Attempt, ended)
