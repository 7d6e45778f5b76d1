"""Which of several ended ranks the local launcher names."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from biroute.launcher.attempts.failures import Failure, Heartbeat, write_failure, write_heartbeat
from biroute.launcher.start.local import _watch

KILLED, FAILED, USAGE_ERROR, FINE = "kill -9 $$", "exit 1", "exit 2", "exit 0"


@pytest.mark.parametrize(
    ("endings", "status", "named"),
    [
        ([FAILED, KILLED], 1, "rank 1 ended by SIGKILL"),
        ([KILLED, FAILED], 1, "rank 0 ended by SIGKILL"),
        ([FAILED, FINE, USAGE_ERROR], 2, "rank 2 exited with status 2"),
        ([FINE, FAILED, FAILED], 1, "rank 1 exited with status 1"),
        ([FINE, FINE], 0, None),
    ],
)
def test_the_cause_is_named_not_its_consequence(
    endings: list[str], status: int, named: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = [subprocess.Popen(["sh", "-c", ending]) for ending in endings]
    for number, rank in enumerate(ranks):
        rank.wait()
        (tmp_path / f"rank-{number:05d}.log").write_text("what it wrote last\n")
    assert _watch(ranks, tmp_path) == status
    err = capsys.readouterr().err
    assert err == "" if named is None else err.startswith(f"error: {named}\n")


def test_of_ranks_that_failed_alike_the_earliest_cause_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By what the ranks wrote, not by who was looked at first: 0 and 1 only lost their connection to 2."""
    ranks = [subprocess.Popen(["sh", "-c", FAILED]) for _ in range(3)]
    for number, rank in enumerate(ranks):
        rank.wait()
        kind, error = ("error", "ValueError: boom") if number == 2 else ("peer", "Connection closed by peer")
        write_failure(tmp_path, Failure(number, "here", float(number), 7, kind, error))  # type: ignore[arg-type]
        (tmp_path / f"rank-{number:05d}.log").write_text(f"last words of {number}\n")
    assert _watch(ranks, tmp_path) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: rank 2 on here: ValueError: boom\n")
    assert "last words of 2" in err


def test_what_nccl_ended_is_told_from_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timeout = (
        "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9, OpType=ALLREDUCE, NumelIn=1, "
        "NumelOut=1, Timeout(ms)=600000) ran for 600029 milliseconds before timing out."
    )
    ranks = [subprocess.Popen(["sh", "-c", ending]) for ending in (FAILED, "kill -ABRT $$")]
    for number, rank in enumerate(ranks):
        rank.wait()
        write_heartbeat(tmp_path, Heartbeat(number, "here", 1, float(number), 7, "training"))
    write_failure(tmp_path, Failure(0, "here", 2.0, 7, "peer", "Connection closed by peer"))
    (tmp_path / "rank-00001.log").write_text(timeout + "\nterminate called\n")
    assert _watch(ranks, tmp_path) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: hang: NCCL's ALLREDUCE (number 9 of its group) did not end within 600 s on rank 1")


def test_a_usage_error_of_another_rank_is_its_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = [subprocess.Popen(["sh", "-c", ending]) for ending in (FAILED, USAGE_ERROR)]
    for rank in ranks:
        rank.wait()
    write_failure(tmp_path, Failure(1, "here", 1.0, 7, "user", "a.tar: it is damaged; build it again"))
    write_failure(tmp_path, Failure(0, "here", 2.0, 7, "peer", "Connection closed by peer"))
    assert _watch(ranks, tmp_path) == 2
    assert capsys.readouterr().err == "error: a.tar: it is damaged; build it again\n"


def test_rank_0_that_only_lost_a_silent_rank_is_shown_from_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What follows from another rank's end, rank 0 wrote to its log alone."""
    ranks = [subprocess.Popen(["sh", "-c", FAILED]) for _ in range(2)]
    for rank in ranks:
        rank.wait()
    write_failure(tmp_path, Failure(0, "here", 2.0, 7, "peer", "Connection closed by peer"))
    (tmp_path / "rank-00000.log").write_text("RuntimeError: Connection closed by peer\n")
    assert _watch(ranks, tmp_path) == 1
    assert "RuntimeError: Connection closed by peer" in capsys.readouterr().err
