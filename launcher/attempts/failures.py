"""Records that the ranks of an attempt write, and why it ended according to them. No torch.

    <run>/logs/attempt-0001/
        rank-00003.log              what the rank printed
        nccl-rank-3                 NCCL's last calls, where one of them timed out
        ranks/rank-00003.json       its heartbeat: last known step and activity
        failures/rank-00003.json    the exception, or the hang, that ended it
        preflight/<host>.json       findings of the node check
        stopped.json                the signal that stopped training, and the step that was saved

When a rank dies, its peers fail within milliseconds, because their connections to it close. So the cause is the
earliest failure that is not such a consequence; if all of them are, it is a rank that recorded nothing. The
log of such a rank may tell why NCCL's watchdog ended it.
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
from biroute.configs.records import last_lines, parse_json, read_small, record_of
from biroute.launcher.attempts.nccl import Abort, describe_timeout, find_abort, means_lost_peer, without_preamble
from biroute.launcher.attempts.run_files import PREFLIGHT

Kind = Literal["error", "user", "peer", "hang"]

_WORDS_OF_SLURM = {
    "TIMEOUT": "time limit",
    "PREEMPTED": "preempted",
    "NODE_FAIL": "a node was lost",
    "REQUEUED": "queued again by Slurm or an administrator",
    "CANCELLED": "scancel",
}
# The kernel and Slurm with cgroups, Slurm without them, C, torch and Python.
_OUT_OF_MEMORY = re.compile(
    r"oom[-_ ]?kill|out[- ]of[- ]memory|exceeded (job |step )?memory limit"
    r"|can(no|')t allocate memory|bad_alloc|MemoryError",
    re.IGNORECASE,
)
# torch, NCCL, cuBLAS.
_OF_THE_GPU = re.compile(
    r"(CUDA|HIP) (error: |failure (\d+ )?')?out of memory|BLAS_STATUS_ALLOC_FAILED", re.IGNORECASE
)
_MORE_MEMORY = (
    "give the job more (memory_per_node of the cluster profile, then `biroute resume RUN slurm.profile=PROFILE`)"
)
_LESS_MEMORY = "lower train.microbatch_size, or set train.activation_checkpointing=true"
_ENDED_BY = {"SIGBUS": ": a file that it had mapped was cut short, or /dev/shm is full; try `biroute data verify`"}
_RANKS_NAMED = 4
_LINES_OF_LOG_SHOWN = 25
_LOGS_READ = 256  # of ranks that recorded nothing, for what NCCL said: at most 64 MiB
_BRIEF_CHARACTERS = 300
_RecordType = TypeVar("_RecordType")


@dataclass(frozen=True)
class Failure:
    """What ended a rank. `kind`: an internal error, a usage error, a lost connection to another rank, or a hang."""

    rank: int
    host: str
    time: float  # Unix seconds
    step: int  # last step that the rank completed
    kind: Kind
    error: str
    traceback: str = ""

    def __str__(self) -> str:
        return self.error if self.kind == "hang" else f"rank {self.rank} on {self.host}: {_brief(self.error)}"


@dataclass(frozen=True)
class Heartbeat:
    """Last known step and activity of a rank."""

    rank: int
    host: str
    pid: int
    time: float
    step: int
    doing: str


@dataclass(frozen=True)
class End:
    """How an attempt ended, as far as its records show."""

    status: int
    cause: str
    step: int | None = None  # last step that it is known to have reached
    crash: bool = False  # whether it counts towards the limits on restarts
    excluded: tuple[str, ...] = ()  # nodes that must not be used again


def log_file(logs: Path, rank: int) -> Path:
    """Return the file for the output of a rank."""
    return logs / f"rank-{rank:05d}.log"


def nccl_file_prefix(logs: Path) -> str:
    """Return the prefix, to which torch appends the rank, of the files with NCCL's last calls."""
    return str(logs.absolute() / "nccl-rank-")


def record_failure(logs: Path, rank: int, step: int, error: Exception) -> None:
    """Record the exception that ends this rank. Never raises, as the disk may be gone."""
    kind: Kind = "error"
    text, host = f"{type(error).__name__}: {error}", socket.gethostname()
    if isinstance(error, UsageError):
        kind, text = "user", f"{error}"
    elif timeout := describe_timeout(str(error)):
        kind, text = "hang", f"hang: {timeout} on rank {rank} on {host}"
    elif is_consequence(error):
        kind = "peer"
    lines = "".join(traceback.format_exception(error))
    write_failure(logs, Failure(rank, host, time.time(), step, kind, text, lines))


def is_consequence(error: Exception) -> bool:
    """Return whether an error is the loss of the connection to another rank, which ended before."""
    return means_lost_peer(str(error))


def write_failure(logs: Path, failure: Failure) -> None:
    """Record a failure, unless the rank has already recorded one. Never raises."""
    path = logs / "failures" / f"rank-{failure.rank:05d}.json"
    with contextlib.suppress(OSError):
        if not path.exists():
            _write(path, asdict(failure))


def write_heartbeat(logs: Path, heartbeat: Heartbeat) -> None:
    """Record a rank's heartbeat.

    Raises:
        OSError: the write failed.
    """
    _write(logs / "ranks" / f"rank-{heartbeat.rank:05d}.json", asdict(heartbeat))


def record_stop(logs: Path, step: int | None, signal_name: str) -> None:
    """Record that a signal stopped training after `step`; None: before the first step. Never raises."""
    with contextlib.suppress(OSError):
        _write(logs / "stopped.json", {"step": step, "signal": signal_name})


def read_failures(logs: Path) -> list[Failure]:
    """Read the failures of all ranks, earliest first."""
    return sorted(_read_all(logs / "failures", Failure), key=lambda failure: failure.time)


def read_heartbeats(logs: Path) -> list[Heartbeat]:
    """Read the heartbeats of all ranks, sorted by rank."""
    return sorted(_read_all(logs / "ranks", Heartbeat), key=lambda heartbeat: heartbeat.rank)


def seconds_since_heartbeat(logs: Path) -> float | None:
    """Return how long ago any rank of the attempt showed a sign of life; None if none ever has."""
    times = [heartbeat.time for heartbeat in read_heartbeats(logs)]
    return time.time() - max(times) if times else None


def last_step(logs: Path) -> int | None:
    """Return the last step that any rank is known to have reached; None before the first."""
    steps = [heartbeat.step for heartbeat in read_heartbeats(logs)] + [
        failure.step for failure in read_failures(logs)
    ]
    return max(steps, default=0) or None


def first_failure(logs: Path) -> Failure | None:
    """Return the failure that caused the others: the earliest that is not a consequence, or else the earliest.

    Where all are consequences, or there are none, the logs of the other ranks come first: NCCL may have ended them.
    """
    failures = read_failures(logs)
    cause = next((failure for failure in failures if failure.kind != "peer"), None) or _ended_by_nccl(logs)
    return cause or (failures[0] if failures else None)


def silent_ranks(logs: Path) -> list[Heartbeat]:
    """Return the heartbeats of those ranks that recorded no failure."""
    told = {failure.rank for failure in read_failures(logs)}
    return [heartbeat for heartbeat in read_heartbeats(logs) if heartbeat.rank not in told]


def bad_nodes(logs: Path) -> dict[str, list[str]]:
    """Return host -> problems that the preflight found there, for hosts with problems."""
    found: dict[str, list[str]] = {}
    for path in sorted((logs / PREFLIGHT).glob("*.json")):
        record = _read(path)
        if record and record.get("problems"):
            found[str(record.get("host", path.stem))] = [str(problem) for problem in record["problems"]]
    return found


def nodes_not_begun(logs: Path, nodes: Sequence[str]) -> dict[str, list[str]]:
    """Return host -> problem for nodes on which not even the preflight began, while it did on others."""
    begun = {path.stem for path in (logs / PREFLIGHT).glob("*.json")}
    missing = [node for node in nodes if node not in begun]
    return {node: ["BiRoute's Python did not start there"] for node in missing} if begun & set(nodes) else {}


def explain_end(
    logs: Path, status: int, signal_name: str = "", nodes: Sequence[str] = (), said: Sequence[str] = ()
) -> End:
    """Explain why an attempt ended with `status`.

    Args:
        logs: the attempt's folder of logs.
        status: exit status of its ranks' launcher.
        signal_name: the signal that the job received, if any, and how Slurm ended it, such as `USR1 (TIMEOUT)`.
        nodes: all nodes of a Slurm job.
        said: lines that Slurm wrote during the attempt.
    """
    signal_name, _, ended_by = signal_name.rstrip(")").partition(" (")
    signal_name = f"SIG{signal_name.removeprefix('SIG')}" if signal_name else ""
    words = _WORDS_OF_SLURM.get(ended_by, "")
    step = last_step(logs)
    stopped = _read(logs / "stopped.json")
    if status == EXIT_OK:
        return End(status, "the last step is done", step)
    if status == EXIT_STOPPED:
        name = stopped["signal"] if stopped else signal_name or "a signal"
        name = f"{words} ({name})" if words else name
        if stopped and stopped["step"] is not None:
            return End(status, f"{name}, stopped after step {stopped['step']}", int(stopped["step"]))
        return End(status, f"{name} before training began", step)
    bad = bad_nodes(logs) or (nodes_not_begun(logs, nodes) if not read_heartbeats(logs) else {})
    if bad:
        cause = "; ".join(f"node {node}: {', '.join(problems)}" for node, problems in bad.items())
        return End(status, f"preflight: {cause}", step, crash=True, excluded=tuple(bad))
    first = first_failure(logs)
    if status == EXIT_USAGE_ERROR:
        unknown = f"an error in the configuration or data, or Python did not start; see {logs}"
        return End(status, first.error if first is not None else unknown, step)
    if first is not None and first.kind != "peer":
        # A hang may be the wait for a rank that Slurm killed.
        about = [first.error, *said] if first.kind == "hang" else [first.error]
        return End(status, f"{first}{_memory_remedy(about)}", first.step, crash=True)
    if signal_name and first is None:
        name = f"{words} ({signal_name})" if words else signal_name
        return End(status, f"{name}; the ranks ended before they could save", step)
    return End(status, _cause_without_record(logs, status, first, said), step, crash=True)


def format_first_failure(logs: Path) -> str:
    """Describe the first failure for people, with its traceback or the last lines of a log; "" if there is none."""
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
    """Return the last lines that a rank printed; "" if it has no log."""
    path = log_file(logs, rank)
    if not path.exists():
        return ""
    lines = last_lines(path, _LINES_OF_LOG_SHOWN)
    return "\n".join([f"last lines of {path}:", *(f"  {line}" for line in lines)])


def ending(status: int) -> str:
    """Describe an exit status of Popen or a shell: `ended by SIGKILL` or `exited with status 1`."""
    number = -status if status < 0 else status - 128
    with contextlib.suppress(ValueError):
        if number > 0:
            name = signal.Signals(number).name
            return f"ended by {name}{_ENDED_BY.get(name, '')}"
    return f"exited with status {status}"


def name_ranks(heartbeats: Sequence[Heartbeat]) -> str:
    """List ranks with their hosts, such as `rank 3 on n2` or `ranks 0 on n0, 1 on n0 and 12 more`."""
    if len(heartbeats) == 1:
        return f"rank {heartbeats[0].rank} on {heartbeats[0].host}"
    named = ", ".join(f"{heartbeat.rank} on {heartbeat.host}" for heartbeat in heartbeats[:_RANKS_NAMED])
    more = len(heartbeats) - _RANKS_NAMED
    return f"ranks {named}" + (f" and {more} more" if more > 0 else "")


def _cause_without_record(logs: Path, status: int, first: Failure | None, said: Sequence[str]) -> str:
    silent = silent_ranks(logs)
    if not silent and first is not None:
        return f"{first}; every rank lost a connection, as where the network fails"
    if not silent:
        return f"it {ending(status)} before any rank wrote a heartbeat{_memory_remedy(said)}"
    last = f"last seen at step {max(heartbeat.step for heartbeat in silent)}"
    # slurmstepd writes into the output of the ranks that it kills, srun into that of the job.
    if remedy := _memory_remedy([*said, *(tail_of_log(logs, one.rank) for one in silent[:_RANKS_NAMED])]):
        return f"{name_ranks(silent)} ended without recording anything ({last}){remedy}"
    killed = f"{name_ranks(silent)} ended without recording anything, as after SIGKILL or the loss of a node ({last}"
    if first is None:
        return f"{killed}); the job {ending(status)}"
    return f"{killed}); the others lost their connection to it"


def _ended_by_nccl(logs: Path) -> Failure | None:
    """Return why NCCL's watchdog ended ranks that recorded nothing: an error of one of them, or else a hang."""
    silent = silent_ranks(logs)
    # Any of them can tell; of very many those at equal distances, so that no group of neighbours is left out.
    read = silent[:: -(-len(silent) // _LOGS_READ) or 1]
    aborts = [(one, find_abort(log_file(logs, one.rank))) for one in read]
    told = [(one, abort) for one, abort in aborts if abort is not None]
    for one, abort in told:
        if abort.kind == "error":
            return _failure_of(one, abort, abort.text)
    hung = [(one, abort) for one, abort in told if abort.kind == "hang"]
    if not hung:
        return None
    text = f"hang: {hung[0][1].text} on {name_ranks([hung[0][0]])}"
    text += f", and likewise on {len(hung) - 1} more" if len(hung) > 1 else ""
    if quiet := [one for one, abort in aborts if abort is None]:
        text += f"; none timed out on {name_ranks(quiet)}, so the others may wait for that"
    return _failure_of(*hung[0], text)


def _failure_of(one: Heartbeat, abort: Abort, text: str) -> Failure:
    lines = "\n".join(abort.lines[:_LINES_OF_LOG_SHOWN])
    kind: Kind = "hang" if abort.kind == "hang" else "error"
    return Failure(one.rank, one.host, one.time, one.step, kind, text, lines)


def _memory_remedy(said: Sequence[str]) -> str:
    """Return the words for a rank that got no more memory; "" if nothing that was said is about that."""
    if any(_OF_THE_GPU.search(text) for text in said):
        return f": the GPU's memory ran out; {_LESS_MEMORY}"
    if any(_OUT_OF_MEMORY.search(text) for text in said):
        return f": memory ran out; {_MORE_MEMORY}, or {_LESS_MEMORY}"
    return ""


def _brief(text: str) -> str:
    line = " ".join(without_preamble(text).split())
    return line if len(line) <= _BRIEF_CHARACTERS else line[:_BRIEF_CHARACTERS] + "..."


def _write(path: Path, record: dict[str, Any]) -> None:
    """Write a record atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, ensure_ascii=False).encode(), durable=False)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = parse_json(read_small(path))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _read_all(folder: Path, kind: type[_RecordType]) -> list[_RecordType]:
    found = []
    for path in folder.glob("rank-*.json"):
        record = _read(path)
        with contextlib.suppress(ValueError):
            if record is not None:
                found.append(record_of(kind, record))
    return found
