"""The local launcher: starts the ranks of one machine as processes, watches them, forwards signals. No torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from biroute.configs.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, EXIT_STOPPED, EXIT_USAGE_ERROR
from biroute.configs.files import append_file
from biroute.configs.messages import printable
from biroute.launcher.attempts.failures import ending, first_failure, log_file, tail_of_log
from biroute.launcher.attempts.journal import ATTEMPT_VARIABLE
from biroute.launcher.ranks.environment import RENDEZVOUS_FILE
from biroute.launcher.ranks.stop_signal import STOP_SIGNALS, handled_signals

GRACE_SECONDS = 10.0  # between one rank's failure and the end of the others
POLL_SECONDS = 0.1
WORKER = "biroute.launcher.start.worker"


def run_local_ranks(
    arguments: Sequence[str], processes: int, logs: Path, attempt: int | None, module: str = WORKER
) -> int:
    """Run `processes` ranks of `python -m <module> <arguments>`; returns their common status.

    Rank 0 writes to this terminal and keeps a copy, the others write to `logs/rank-<n>.log`. If a rank fails, the
    others are ended, and the last lines of the rank that failed first are shown. Ranks of an `attempt` train.
    """
    with tempfile.TemporaryDirectory(prefix="biroute-") as folder:
        # Blocked until the handlers that forward them are set; the ranks inherit this and unblock them when ready.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        ranks = [
            _start([module, *arguments], rank, processes, Path(folder), logs, attempt) for rank in range(processes)
        ]
        previous = {number: signal.signal(number, _forwarder(ranks)) for number in handled_signals()}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        try:
            return _watch(ranks, logs)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
                rank.wait()


def _start(
    arguments: Sequence[str], rank: int, processes: int, folder: Path, logs: Path, attempt: int | None
) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        **({} if attempt is None else {ATTEMPT_VARIABLE: str(attempt)}),
        RENDEZVOUS_FILE: str(folder / "rendezvous"),  # a file, as a port could be in use
        # numpy, OpenBLAS and SentencePiece would each start a thread per core in every rank.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes))),
    }
    # -P: a file of the user's such as random.py must not be imported for the library's.
    command = [sys.executable, "-P", "-m", *arguments]
    if rank == 0:
        return subprocess.Popen(command, env=environment)
    with append_file(log_file(logs, rank)) as log:
        # In its own session: Ctrl-C then reaches only rank 0 and the launcher, which forwards it to all ranks.
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def _forwarder(ranks: list[subprocess.Popen[bytes]]):  # type: ignore[no-untyped-def]
    def forward(number: int, _: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    return forward


def _watch(ranks: list[subprocess.Popen[bytes]], logs: Path) -> int:
    """Wait for all ranks; after a failure, end those still running."""
    failed: int | None = None
    deadline = float("inf")
    while any(rank.poll() is None for rank in ranks):
        if failed is None:
            failed = _first_failed(ranks)
            if failed is not None:
                deadline = time.monotonic() + GRACE_SECONDS
        elif time.monotonic() > deadline:
            for rank in ranks:
                rank.kill()
        time.sleep(POLL_SECONDS)
    if failed is None:
        failed = _first_failed(ranks)
    if failed is None:
        return EXIT_OK
    codes = [rank.returncode for rank in ranks]
    first = first_failure(logs)
    if codes[failed] in (EXIT_STOPPED, EXIT_USAGE_ERROR, EXIT_INTERRUPTED):
        if failed != 0 and codes[0] != codes[failed]:
            if first is not None and first.kind == "user":
                print(printable(f"error: {first.error}"), file=sys.stderr)
            else:
                _show_log(failed, codes[failed], logs)
        return codes[failed]
    aborted = codes[failed] == -signal.SIGABRT  # as by NCCL's watchdog, and then the rank's log may tell why
    if first is not None and (codes[failed] == EXIT_FAILURE or (aborted and first.kind != "peer")):
        # By the ranks' own clocks, not by the order of polling.
        print(printable(f"error: {first}"), file=sys.stderr)
        failed = first.rank
    _show_log(failed, codes[failed], logs, on_terminal=failed == 0 and (first is None or first.kind != "peer"))
    return EXIT_FAILURE


def _first_failed(ranks: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Return which of the ranks that have failed by now to name; None if there is none.

    When a rank fails, its peers fail within milliseconds, because their connections to it close. So a rank that was
    killed by a signal or ended with a usage error is the cause, and one that raised may be a consequence.
    """
    if all(rank.poll() in (None, EXIT_OK) for rank in ranks):
        return None
    # Poll all ranks again: the cause may have ended after it was polled, but before its peer was.
    failures = [(code, n) for n, rank in enumerate(ranks) if (code := rank.poll()) not in (None, EXIT_OK)]
    return min(failures, key=lambda failure: (failure[0] >= 0, failure[0] == EXIT_FAILURE, failure[1]))[1]


def _show_log(rank: int, code: int, logs: Path, on_terminal: bool = False) -> None:
    """Say how a rank ended, with the end of its log unless that was `on_terminal`, as rank 0's is."""
    print(f"error: rank {rank} {ending(code)}", file=sys.stderr)
    if not on_terminal:
        print(printable(tail_of_log(logs, rank)), file=sys.stderr)
