"""What the ranks of an attempt leave for whoever asks why it ended. No torch.

    <run>/logs/attempt-0001/
        rank-00003.log              what the rank printed
        ranks/rank-00003.json       its heartbeat: where it last was, written every now and then
        failures/rank-00003.json    the exception, or the hang, that ended it
        preflight/<host>.json       what the check of the node found
        stopped.json                training stopped because it was asked to, state saved

A rank that dies takes its peers along: within milliseconds they fail because their connection to it closed. So the
cause is the earliest failure that isn't such a consequence; if all are, it's a rank that recorded nothing.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from biroute.configs.errors import EXIT_OK, EXIT_STOPPED, EXIT_USAGE_ERROR, UsageError
from biroute.configs.files import write_atomically
from biroute.launcher.attempts.run_files import PREFLIGHT

Kind = Literal["error", "user", "peer", "hang"]

_LOST_PEER = re.compile(
    r"closed by (remote )?peer|connection reset|broken pipe|remote process exited|network error|socket closed"
    r"|connection refused|socket timeout|recvvalue failed"
    r"|communicator was aborted|ncclremoteerror|ncclsystemerror|unhandled system error",
    re.IGNORECASE,
)
_RANKS_NAMED = 4
_LINES_OF_LOG_SHOWN = 25
_BRIEF_CHARACTERS = 300
_RecordType = TypeVar("_RecordType")


@dataclass(frozen=True)
class Failure:
    """What ended a rank. `kind`: a bug, a usage error, a lost connection to another rank, a hang."""

    rank: int
    host: str
    time: float  # Unix seconds
    step: int  # last step that the rank has begun
    kind: Kind
    error: str
    traceback: str = ""

    def __str__(self) -> str:
        return self.error if self.kind == "hang" else f"rank {self.rank} on {self.host}: {_brief(self.error)}"


@dataclass(frozen=True)
class Heartbeat:
    """Where a rank last was."""

    rank: int
    host: str
    pid: int
    time: float
    step: int
    doing: str


@dataclass(frozen=True)
class End:
    """How an attempt ended, as far as its records tell."""

    status: int
    cause: str
    step: int | None = None  # the last that it is known to have reached
    crash: bool = False  # it counts towards the limits on restarts
    excluded: tuple[str, ...] = ()  # nodes that must not be used again


def log_file(logs: Path, rank: int) -> Path:
    """What a rank printed."""
    return logs / f"rank-{rank:05d}.log"


def record_failure(logs: Path, rank: int, step: int, error: Exception) -> None:
    """Write down the exception that ends this rank. Never raises: there may be no disk left."""
    kind: Kind = "error"
    if isinstance(error, UsageError):
        kind = "user"
    elif _LOST_PEER.search(str(error)):
        kind = "peer"
    text = f"{error}" if kind == "user" else f"{type(error).__name__}: {error}"
    lines = "".join(traceback.format_exception(error))
    write_failure(logs, Failure(rank, socket.gethostname(), time.time(), step, kind, text, lines))


def write_failure(logs: Path, failure: Failure) -> None:
    """The first failure of a rank stays. Never raises."""
    path = logs / "failures" / f"rank-{failure.rank:05d}.json"
    with contextlib.suppress(OSError):
        if not path.exists():
            _write(path, asdict(failure))


def write_heartbeat(logs: Path, heartbeat: Heartbeat) -> None:
    """Raises OSError."""
    _write(logs / "ranks" / f"rank-{heartbeat.rank:05d}.json", asdict(heartbeat))


def record_stop(logs: Path, step: int | None, signal_name: str) -> None:
    """Training stopped after `step` because of a signal; None: before its first one. Never raises."""
    with contextlib.suppress(OSError):
        _write(logs / "stopped.json", {"step": step, "signal": signal_name})


def read_failures(logs: Path) -> list[Failure]:
    """Earliest first."""
    return sorted(_read_all(logs / "failures", Failure), key=lambda failure: failure.time)


def read_heartbeats(logs: Path) -> list[Heartbeat]:
    """By rank."""
    return sorted(_read_all(logs / "ranks", Heartbeat), key=lambda heartbeat: heartbeat.rank)


def last_step(logs: Path) -> int | None:
    """The last step that any rank is known to have reached."""
    steps = [heartbeat.step for heartbeat in read_heartbeats(logs)] + [
        failure.step for failure in read_failures(logs)
    ]
    return max(steps, default=0) or None


def first_failure(logs: Path) -> Failure | None:
    """The failure that caused the others: the earliest that is no mere consequence, else the earliest."""
    failures = read_failures(logs)
    return next((failure for failure in failures if failure.kind != "peer"), failures[0] if failures else None)


def silent_ranks(logs: Path) -> list[Heartbeat]:
    """Ranks that were there and left no failure."""
    told = {failure.rank for failure in read_failures(logs)}
    return [heartbeat for heartbeat in read_heartbeats(logs) if heartbeat.rank not in told]


def bad_nodes(logs: Path) -> dict[str, list[str]]:
    """Host -> what the preflight found wrong there."""
    found: dict[str, list[str]] = {}
    for path in sorted((logs / PREFLIGHT).glob("*.json")):
        record = _read(path)
        if record and record.get("problems"):
            found[str(record.get("host", path.stem))] = [str(problem) for problem in record["problems"]]
    return found


def explain_end(logs: Path, status: int, signal_name: str = "") -> End:
    """Why an attempt ended with `status`; `signal_name` is what the job itself received (USR1), if anything."""
    signal_name = f"SIG{signal_name.removeprefix('SIG')}" if signal_name else ""
    step = last_step(logs)
    stopped = _read(logs / "stopped.json")
    if status == EXIT_OK:
        return End(status, "the last step is done", step)
    if status == EXIT_STOPPED:
        name = stopped["signal"] if stopped else signal_name or "a signal"
        if stopped and stopped["step"] is not None:
            return End(status, f"{name}, stopped after step {stopped['step']}", int(stopped["step"]))
        return End(status, f"{name} before training began", step)
    nodes = bad_nodes(logs)
    if nodes:
        cause = "; ".join(f"node {node}: {', '.join(problems)}" for node, problems in nodes.items())
        return End(status, f"preflight: {cause}", step, crash=True, excluded=tuple(nodes))
    first = first_failure(logs)
    if status == EXIT_USAGE_ERROR:
        return End(status, first.error if first is not None else "a fault in the configuration or data", step)
    if first is not None and first.kind != "peer":
        return End(status, str(first), first.step, crash=True)
    if signal_name and first is None:
        return End(status, f"{signal_name}; the ranks ended before they could save", step)
    return End(status, _without_a_word(logs, status, first), step, crash=True)


def tell_first_failure(logs: Path) -> str:
    """The first failure with its traceback and the last lines of that rank's log, for people; "" if there is none."""
    first = first_failure(logs)
    silent = silent_ranks(logs)
    if first is None or (first.kind == "peer" and silent):
        if not silent or len(silent) > _RANKS_NAMED:
            return ""
        parts = [tail_of_log(logs, heartbeat.rank) for heartbeat in silent]
        return "\n".join(part for part in parts if part)
    shown = [str(first)]
    if first.traceback and first.kind != "user":
        shown += ["  " + line for line in first.traceback.rstrip().splitlines()[-_LINES_OF_LOG_SHOWN:]]
    return "\n".join(shown)


def tail_of_log(logs: Path, rank: int) -> str:
    """The last lines that a rank printed; "" if it has no log."""
    path = log_file(logs, rank)
    if not path.exists():
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-_LINES_OF_LOG_SHOWN:]
    return "\n".join([f"last lines of {path}:", *(f"  {line}" for line in lines)])


def ending(status: int) -> str:
    """`ended by SIGKILL` or `exited with status 1`, for the statuses of Popen and of a shell."""
    number = -status if status < 0 else status - 128
    with contextlib.suppress(ValueError):
        if number > 0:
            return f"ended by {signal.Signals(number).name}"
    return f"exited with status {status}"


def name_ranks(heartbeats: Sequence[Heartbeat]) -> str:
    """`rank 3 on n2` or `ranks 0, 1, 2, 3 and 12 more`."""
    if len(heartbeats) == 1:
        return f"rank {heartbeats[0].rank} on {heartbeats[0].host}"
    named = ", ".join(f"{heartbeat.rank} on {heartbeat.host}" for heartbeat in heartbeats[:_RANKS_NAMED])
    more = len(heartbeats) - _RANKS_NAMED
    return f"ranks {named}" + (f" and {more} more" if more > 0 else "")


def _without_a_word(logs: Path, status: int, first: Failure | None) -> str:
    silent = silent_ranks(logs)
    if not silent:
        return f"it {ending(status)} before any rank said where it was"
    last = f"last seen at step {max(heartbeat.step for heartbeat in silent)}"
    killed = f"{name_ranks(silent)} ended without recording anything, as SIGKILL or a lost node do ({last}"
    if first is None:
        return f"{killed}); the job {ending(status)}"
    return f"{killed}); the others lost their connection to it"


def _brief(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _BRIEF_CHARACTERS else line[:_BRIEF_CHARACTERS] + "..."


def _write(path: Path, record: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, ensure_ascii=False).encode(), durable=False)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _read_all(folder: Path, kind: type[_RecordType]) -> list[_RecordType]:
    found = []
    for path in folder.glob("rank-*.json"):
        record = _read(path)
        with contextlib.suppress(TypeError):
            if record is not None:
                found.append(kind(**record))
    return found
