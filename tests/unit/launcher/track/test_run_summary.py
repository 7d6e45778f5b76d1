"""The description of a run, from its folder."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from biroute.launcher.attempts.journal import read_attempts
from biroute.launcher.track.metrics_log import MetricsLog
from biroute.launcher.track.run_summary import RunSummary


def journal(run_dir: Path, *spans: tuple[float, float | None]) -> None:
    lines = []
    for number, (began, ended) in enumerate(spans, 1):
        lines.append({"attempt": number, "event": "begin", "time": began})
        if ended is not None:
            lines.append({"attempt": number, "event": "end", "time": ended, "status": 75, "cause": "time limit"})
    (run_dir / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_goodput_counts_repeated_steps_once_and_the_gaps_between_attempts_not_at_all(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 10, 20):
        log.append(step, {"time/step_seconds": 2.0, "progress/tokens": step * 100.0})
    now = time.time()
    journal(tmp_path, (now - 500, now - 440), (now - 100, now - 60))  # 100 s together
    summary = RunSummary(tmp_path)
    summary.follow()
    assert summary.useful_seconds == 40.0
    assert summary.goodput(read_attempts(tmp_path)) == pytest.approx(0.4)
    MetricsLog(tmp_path / "metrics.jsonl").append(10, {"time/step_seconds": 50.0})  # after a resume: step 10 again
    log.append(30, {"time/step_seconds": 1.0})
    summary.follow()
    assert summary.useful_seconds == 50.0


def test_the_note_says_how_far_how_good_how_fast_and_where(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(10, {"time/step_seconds": 2.0, "progress/tokens": 40_000.0})
    log.append(10, {"heldout/loss": 3.5, "heldout/bits_per_byte": 1.75})
    for step in (5, 10):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    now = time.time()
    journal(tmp_path, (now - 40, now))
    summary = RunSummary(tmp_path)
    summary.follow()
    assert summary.note("12 M parameters, tensor=2", 100).splitlines() == [
        "12 M parameters, tensor=2",
        "",
        "| | |",
        "| --- | --- |",
        "| progress | step 10 of 100, 40.0k tokens |",
        "| held-out | 1.7500 bits per byte at step 10 |",
        "| speed | 2.00k tokens/s in the mean of all steps; 50% of the time of all attempts (0:20) went into them |",
        f"| newest checkpoint | `{tmp_path}/checkpoints/step-00000010` |",
        "| attempts | 1; the last one: time limit |",
        f"| run folder | `{tmp_path}` |",
    ]


def test_a_run_that_has_only_begun_has_a_short_note(tmp_path: Path) -> None:
    assert RunSummary(tmp_path).note("small", 8).splitlines()[4:] == [f"| run folder | `{tmp_path}` |"]


def test_the_note_has_the_plan_beside_what_was_measured(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(10, {"time/step_seconds": 2.0, "progress/tokens": 40_000.0, "memory/peak_gib": 3.0})
    log.append(20, {"time/step_seconds": 3.0, "progress/tokens": 80_000.0, "memory/peak_gib": 1.0})
    summary = RunSummary(tmp_path)
    summary.follow()
    tags = {
        "plan.device": "a GPU",
        "plan.step_seconds": "0.5",
        "plan.tokens_per_second": "8000",
        "plan.peak_gib": "4",
    }
    note = summary.note("small", 20, tags=tags).splitlines()
    assert "| predicted | 0.5 s a step, 8.00k tokens/s, 4 GiB of a rank, on a GPU |" in note
    assert "| measured | 2.5 s a step, 1.60k tokens/s, 3 GiB of a rank |" in note
    assert not [line for line in summary.note("small", 20, tags={"layout": "x"}).splitlines() if "measured" in line]
