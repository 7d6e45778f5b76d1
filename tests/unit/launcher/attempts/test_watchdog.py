"""Who is named when nothing moves any more, and that a process which was itself stopped raises no alarm."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from biroute.launcher.attempts.failures import Heartbeat, read_heartbeats
from biroute.launcher.attempts.watchdog import HangReport, name_missing, where_in


def report(
    rank: int, collective: str = "all_reduce", place: str = "launcher/train/trainer.py:9 in fit"
) -> HangReport:
    return HangReport(rank, f"n{rank}", 4, "training", collective, place, 31.0)


HEARTBEATS = [Heartbeat(rank, f"n{rank}", 1, 0.0, 4, "saving after step 4") for rank in range(2)]


@pytest.mark.parametrize(
    ("reports", "parts"),
    [
        (
            [report(0)],
            [
                "rank 1 on n1 did not reach all_reduce (launcher/train/trainer.py:9 in fit) of step 5",
                "saving after step 4",
            ],
        ),
        (
            [report(0), report(1, "", "data_pipeline/read/loader.py:7 in step")],
            ["rank 1 on n1 did not", "loader.py:7"],
        ),
        (
            [report(0, "barrier"), report(1)],
            ["wait for each other", "rank 0 on n0 in barrier", "rank 1 on n1 in all"],
        ),
    ],
)
def test_the_missing_rank_is_named(reports: list[HangReport], parts: list[str]) -> None:
    text = name_missing({item.rank: item for item in reports}, HEARTBEATS, 2)
    assert all(part in text for part in parts), text


def test_a_rank_that_never_started_is_named() -> None:
    assert "rank 2 did not reach" in name_missing({0: report(0), 1: report(1)}, HEARTBEATS, 3)
    assert "it never started" in name_missing({0: report(0), 1: report(1)}, HEARTBEATS, 3)


def test_place_of_a_thread_in_our_code_and_in_a_collective(tmp_path: Path) -> None:
    """A real store that nobody answers: what a rank waits in when others never come."""
    code = """
import sys, threading, time
from datetime import timedelta
from biroute.launcher.ranks.environment import RankEnvironment
from biroute.launcher.attempts.watchdog import where_in
from biroute.launcher.ranks.rendezvous import _handshake
def meet():
    try:
        _handshake(RankEnvironment(0, 0, 2, file=sys.argv[1]), "gloo", timedelta(seconds=20), None)
    except Exception:
        pass
thread = threading.Thread(target=meet)
thread.start()
deadline = time.monotonic() + 15
while time.monotonic() < deadline:
    found = where_in(sys._current_frames().get(thread.ident))
    if found[0]:
        break
    time.sleep(0.05)
print(*found, sep="|", flush=True)
import os
os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "store")], capture_output=True, text=True, check=False
    )
    collective, place = done.stdout.strip().split("|")
    assert collective == "init_process_group", done.stderr
    assert place.startswith("launcher/ranks/rendezvous.py:")
    assert place.endswith("in _handshake")
    assert where_in(None) == ("", "")


WATCHED = """
import sys, time
from pathlib import Path
from biroute.launcher.attempts.watchdog import Watchdog
watchdog = Watchdog()
watchdog.watch(Path(sys.argv[1]), 0, 1, hang_seconds=float(sys.argv[2]), startup_seconds=float(sys.argv[2]))
watchdog.reached("training", 3)
print("ready", flush=True)
time.sleep(float(sys.argv[3]))
watchdog.close()
print("awake", flush=True)
"""


def test_the_alarm_ends_a_process_that_stands_still(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(tmp_path), "2", "600"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert "the stacks of this rank" in done.stderr
    failure = json.loads((tmp_path / "failures" / "rank-00000.json").read_text())
    assert (failure["kind"], failure["step"]) == ("hang", 3)
    assert [(heartbeat.step, heartbeat.doing) for heartbeat in read_heartbeats(tmp_path)] == [(3, "training")]


@pytest.mark.slow
def test_a_process_that_was_stopped_itself_raises_no_alarm(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED, str(tmp_path), "10", "8"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    waker = threading.Timer(14.0, process.send_signal, [signal.SIGCONT])
    waker.start()
    started = time.monotonic()
    out, err = process.communicate(timeout=300)
    assert time.monotonic() - started > 10, "it did stand still for longer than the limit"
    assert (process.returncode, out) == (0, "awake\n"), err


HOLDS_THE_LOCK = """
import ctypes, sys
from pathlib import Path
from biroute.launcher.attempts.watchdog import Watchdog
watchdog = Watchdog()
watchdog.watch(Path(sys.argv[1]), 0, 1, hang_seconds=2, startup_seconds=2)
watchdog.reached("training", 3)
ctypes.PyDLL(None).usleep(8_000_000)
print("awake", flush=True)
"""


def test_a_process_that_holds_the_interpreters_lock_still_shows_where(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOLDS_THE_LOCK, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    shown = done.stderr.partition("nothing new")[0]  # what came before the alarm, which needs the lock
    assert 'File "<string>", line 8 in <module>' in shown, done.stderr
