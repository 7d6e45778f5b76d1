"""The watchdog of one rank: writes its heartbeat, detects a hang, and names the rank that is missing. No torch.

A thread writes the rank's heartbeat into the attempt's logs. When the rank has made no progress within the limit, the
thread dumps all stacks into the rank's log, records in which collective it waits, reads the reports of the others,
names the rank that is missing and ends the process. So a hang ends the attempt, and the next one resumes from the
newest checkpoint.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from biroute.configs.errors import EXIT_FAILURE
from biroute.configs.files import write_atomically
from biroute.configs.records import parse_json, read_small, record_of
from biroute.launcher.attempts.failures import (
    Failure,
    Heartbeat,
    read_heartbeats,
    record_failure,
    write_failure,
    write_heartbeat,
)
from biroute.launcher.attempts.whereabouts import Whereabouts, find_rank, uses_gpu

_SHORTEST_TICK, _LONGEST_TICK = 0.2, 15.0
_RANK_0_TICK = 0.2  # its heartbeat shows the step of the run
_REPORT_SECONDS = 10.0  # how long to wait for the reports of the others


@dataclass(frozen=True)
class HangReport:
    """What a rank was doing when it detected a hang."""

    rank: int
    host: str
    step: int
    doing: str
    collective: str  # name of the collective that it waits in; "" if it is in none
    place: str  # `launcher/train/trainer.py:120 in _evaluate`: the innermost line of BiRoute's code
    waited: float  # seconds
    for_gpu: bool = False  # whether it is in no collective, but seems to wait for its GPU, where one may be queued


class Watchdog:
    """Heartbeat and hang detection of one rank. `reached` is called from the training thread."""

    def __init__(self) -> None:
        self.step = 0
        self._doing = "starting"
        self._since = time.monotonic()
        self._trained = False
        self._allowance = 0.0
        self._logs: Path | None = None
        self._log: TextIO | None = None
        self._rank = self._world_size = 0
        self._hang_seconds = self._startup_seconds = 0.0
        self._closed = threading.Event()
        self._changed = threading.Event()
        self._main = threading.main_thread().ident
        self._shows_stack = False  # whether SIGALRM dumps the stack; by default it would kill
        self._written: tuple[int, str] | None = None

    def watch(
        self,
        logs: Path,
        rank: int,
        world_size: int,
        *,
        hang_seconds: float,
        startup_seconds: float,
        log: TextIO | None = None,
    ) -> None:
        """Start watching; with `hang_seconds` = 0 the heartbeat is written but no hang is detected.

        The stacks of a hang go to standard error, and to `log`.
        """
        self._log = log
        self._logs, self._rank, self._world_size = logs, rank, world_size
        self._hang_seconds, self._startup_seconds = hang_seconds, startup_seconds
        self._write_heartbeat()
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # stderr may not be a file
            # Only the main thread, which handles the signal: reading the frames of a running thread can crash.
            faulthandler.register(signal.SIGALRM, file=sys.stderr, all_threads=False)
            self._shows_stack = True
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def reached(self, doing: str, step: int | None = None) -> None:
        """Report progress: the rank begins `doing`, or has completed optimizer step `step`."""
        first = step is not None and not self._trained
        if step is not None:
            self.step = step
            self._trained = True
        self._doing = doing
        self._since = time.monotonic()
        if self._rank == 0 or first:  # the first step shortens the limit
            self._changed.set()

    def resumed(self, step: int) -> None:
        """Report that the attempt resumes after `step`, which an earlier attempt completed."""
        self.step = step
        self.reached("training")

    def allow(self, seconds: float) -> None:
        """Allow the next activity this many seconds more."""
        self._allowance = seconds
        self.reached("closing")

    def failed(self, error: Exception) -> None:
        """Record the exception that ends this rank."""
        self.close()
        if self._logs is not None:
            self._write_heartbeat()
            record_failure(self._logs, self._rank, self.step, error)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._changed.set()

    def _limit(self) -> float:
        limit = self._hang_seconds if self._trained else max(self._startup_seconds, self._hang_seconds)
        return limit + self._allowance

    def _tick(self) -> float:
        if self._hang_seconds <= 0:
            return _LONGEST_TICK
        return min(_LONGEST_TICK, max(_SHORTEST_TICK, self._limit() / 10))

    def _run(self) -> None:
        looked = time.monotonic()
        while not self._closed.is_set():
            tick = self._tick()
            if self._hang_seconds > 0 and self._shows_stack:
                # If something holds the GIL forever, this thread cannot run, but a signal handler in C can.
                signal.setitimer(signal.ITIMER_REAL, self._limit() + 2 * tick)
            self._changed.wait(tick)
            self._changed.clear()
            stopped = time.monotonic() - looked - tick
            looked = time.monotonic()
            if stopped > tick + 5:
                self._since += stopped  # this process itself was suspended, as by `scontrol suspend`
            if self._closed.is_set():
                break
            if self._hang_seconds > 0 and looked - self._since > self._limit():
                self._end_hang()
            self._write_heartbeat()
            self._closed.wait(_RANK_0_TICK)
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _write_heartbeat(self) -> None:
        assert self._logs is not None
        if self._written == (self.step, self._doing):
            return
        self._written = (self.step, self._doing)
        with contextlib.suppress(OSError):  # training does not depend on the heartbeat
            write_heartbeat(
                self._logs,
                Heartbeat(self._rank, socket.gethostname(), os.getpid(), time.time(), self.step, self._doing),
            )

    def _end_hang(self) -> None:
        assert self._logs is not None
        signal.setitimer(signal.ITIMER_REAL, 0)
        waited = time.monotonic() - self._since
        self._write_heartbeat()
        print(f"\nwatchdog: no progress for {waited:.0f} s; the stacks of this rank:", file=sys.stderr, flush=True)
        for stream in [sys.stderr] if self._log is None else [sys.stderr, self._log]:
            with contextlib.suppress(OSError, ValueError):
                faulthandler.dump_traceback(file=stream, all_threads=True)
        frames = sys._current_frames()
        frame = frames.get(self._main or 0)
        at = Whereabouts("", "", False)
        with contextlib.suppress(Exception):  # whatever the frames hold, a hang must end
            at = find_rank(frames, self._main or 0, uses_gpu())
        report = HangReport(
            self._rank,
            socket.gethostname(),
            self.step,
            self._doing,
            at.collective,
            at.place,
            round(waited, 1),
            at.for_gpu,
        )
        with contextlib.suppress(OSError):
            write_report(self._logs, report)
        reports = self._await_reports()
        text = f"hang: {name_missing(reports, read_heartbeats(self._logs), self._world_size)}"
        stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
        write_failure(
            self._logs, Failure(self._rank, socket.gethostname(), time.time(), self.step, "hang", text, stack)
        )
        print(f"error: {text}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(EXIT_FAILURE)

    def _await_reports(self) -> dict[int, HangReport]:
        assert self._logs is not None
        deadline = time.monotonic() + _REPORT_SECONDS
        while True:
            reports = read_reports(self._logs)
            if len(reports) >= self._world_size or time.monotonic() > deadline:
                return reports
            time.sleep(_SHORTEST_TICK)


def name_missing(reports: Mapping[int, HangReport], heartbeats: Sequence[Heartbeat], world_size: int) -> str:
    """Describe which rank keeps the others waiting, and where they wait.

    A rank that seems to wait for its GPU waits for others, if there is a rank that does neither.
    """
    waiting = [report for report in reports.values() if report.collective or report.for_gpu] or list(reports.values())
    if not waiting:
        return "no rank could report where it was"
    scene = _scene(next((report for report in waiting if report.collective), waiting[0]))
    silent = [rank for rank in range(world_size) if rank not in reports]
    if silent:
        last_seen = {heartbeat.rank: heartbeat for heartbeat in heartbeats}
        first = last_seen.get(silent[0])
        who = f"rank {silent[0]}" + (f" on {first.host}" if first else "")
        who += f" and {len(silent) - 1} more" if len(silent) > 1 else ""
        state = f"it is stopped or its node is lost (last seen: {first.doing})" if first else "it never started"
        return f"{who} did not reach {scene}; {state}"
    elsewhere = [report for report in reports.values() if not report.collective and not report.for_gpu]
    if elsewhere and len(elsewhere) < len(reports):
        late = elsewhere[0]
        return f"rank {late.rank} on {late.host} did not reach {scene}; it is in {late.place or late.doing}"
    groups: dict[str, list[HangReport]] = defaultdict(list)
    for report in reports.values():
        groups[_where(report)].append(report)
    parts = []
    for name, found in sorted(groups.items(), key=lambda group: len(group[1])):  # the odd one first
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        parts.append(f"rank {found[0].rank} on {found[0].host}{more} in {name}")
    step = max(report.step for report in reports.values())
    return f"the ranks wait for each other after step {step}: {'; '.join(parts)}"


def _scene(report: HangReport) -> str:
    """Describe what a rank waits in, as what another one did not reach."""
    rank = f"of step {report.step + 1}, where rank {report.rank} on {report.host}"
    if report.for_gpu:
        before = f"a collective before {report.place or report.doing}"
        return f"{before} {rank} seems to have waited for its GPU {report.waited:.0f} s"
    return f"{_where(report)} {rank} has waited {report.waited:.0f} s"


def _where(report: HangReport) -> str:
    place = report.place or report.doing
    if report.collective:
        return f"{report.collective} ({report.place})" if report.place else report.collective
    return f"{place} (for its GPU, as it seems)" if report.for_gpu else place


def write_report(logs: Path, report: HangReport) -> None:
    """Record a rank's hang report.

    Raises:
        OSError: the write failed.
    """
    folder = logs / "hang"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"rank-{report.rank:05d}.json", json.dumps(asdict(report)).encode(), durable=False)


def read_reports(logs: Path) -> dict[int, HangReport]:
    """Read rank -> its hang report."""
    found = {}
    for path in (logs / "hang").glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            report = record_of(HangReport, parse_json(read_small(path)))
            found[report.rank] = report
    return found
