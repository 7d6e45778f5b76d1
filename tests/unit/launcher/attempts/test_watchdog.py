"""Who is named when nothing moves any more, and that a process which was itself stopped raises no alarm."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from biroute.launcher.attempts.failures import Heartbeat, read_heartbeats
from biroute.launcher.attempts.watchdog import HangReport, name_missing, read_reports, write_report


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


LATE = report(1, "", "data_pipeline/read/loader.py:7 in step")


def waits_for_gpu(rank: int, place: str = "parallel/engine/engine.py:139 in _report") -> HangReport:
    return replace(report(rank, "", place), for_gpu=True)


@pytest.mark.parametrize(
    ("reports", "text"),
    [
        (
            [waits_for_gpu(0), LATE, waits_for_gpu(2)],
            "rank 1 on n1 did not reach a collective before parallel/engine/engine.py:139 in _report of step 5, "
            "where rank 0 on n0 seems to have waited for its GPU 31 s; "
            "it is in data_pipeline/read/loader.py:7 in step",
        ),
        (
            [waits_for_gpu(0), LATE, report(2)],
            "rank 1 on n1 did not reach all_reduce (launcher/train/trainer.py:9 in fit) of step 5, "
            "where rank 2 on n2 has waited 31 s; it is in data_pipeline/read/loader.py:7 in step",
        ),
        (
            [waits_for_gpu(0), waits_for_gpu(2)],
            "rank 1 on n1 did not reach a collective before parallel/engine/engine.py:139 in _report of step 5, "
            "where rank 0 on n0 seems to have waited for its GPU 31 s; it is stopped or its node is lost "
            "(last seen: saving after step 4)",
        ),
        (
            [waits_for_gpu(0), LATE],
            "rank 2 did not reach a collective before parallel/engine/engine.py:139 in _report of step 5, "
            "where rank 0 on n0 seems to have waited for its GPU 31 s; it never started",
        ),
        (
            [waits_for_gpu(0), waits_for_gpu(1), report(2, "reduce")],
            "the ranks wait for each other after step 4: "
            "rank 2 on n2 in reduce (launcher/train/trainer.py:9 in fit); "
            "rank 0 on n0 and 1 more in parallel/engine/engine.py:139 in _report (for its GPU, as it seems)",
        ),
        (
            [replace(LATE, rank=0, host="n0"), waits_for_gpu(1), waits_for_gpu(2)],
            "rank 0 on n0 did not reach a collective before parallel/engine/engine.py:139 in _report of step 5, "
            "where rank 1 on n1 seems to have waited for its GPU 31 s; "
            "it is in data_pipeline/read/loader.py:7 in step",
        ),
        (
            [replace(waits_for_gpu(0), place=""), LATE, report(2, place="")],
            "rank 1 on n1 did not reach all_reduce of step 5, where rank 2 on n2 has waited 31 s; "
            "it is in data_pipeline/read/loader.py:7 in step",
        ),
    ],
)
def test_a_rank_that_waits_for_its_gpu_is_not_the_late_one(reports: list[HangReport], text: str) -> None:
    """NCCL's collectives return at once: the rank then waits where it needs a result."""
    assert name_missing({item.rank: item for item in reports}, HEARTBEATS, 3) == text


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    for item in (waits_for_gpu(3), LATE):
        write_report(tmp_path, item)
    assert read_reports(tmp_path) == {3: waits_for_gpu(3), 1: LATE}


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


NEEDS_A_RESULT = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
# All that the watchdog asks of torch is whether this process has used a GPU.
used = {"gpu": True, "cpu": False}
sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: used[sys.argv[2]]))
from biroute.launcher.attempts.watchdog import Watchdog
watchdog = Watchdog()
watchdog.watch(Path(sys.argv[1]), 0, 1, hang_seconds=1, startup_seconds=1)
watchdog.reached("training", 3)
loss = SimpleNamespace(item=time.sleep)
loss.item(30)
"""


@pytest.mark.parametrize("device", ["gpu", "cpu", "one whose question raises"])
def test_the_watchdog_looks_whether_its_rank_waits_for_a_gpu(tmp_path: Path, device: str) -> None:
    script = tmp_path / "rank.py"
    script.write_text(NEEDS_A_RESULT)
    done = subprocess.run(
        [sys.executable, script, str(tmp_path), device], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1, done.stderr
    assert read_reports(tmp_path)[0].for_gpu == (device == "gpu")


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
