"""What `biroute status` makes of a run folder and a queue, and how a user names a run; without Slurm."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from biroute.configs.errors import UsageError
from biroute.launcher.attempts.failures import End, Failure, Heartbeat, log_file, write_failure, write_heartbeat
from biroute.launcher.attempts.journal import Attempt, Limits, begin_attempt, end_attempt, read_attempts
from biroute.launcher.attempts.run_files import log_dir
from biroute.slurm import client
from biroute.slurm.client import Job
from biroute.slurm.control import cancel_run, resume_run
from biroute.slurm.logs import follow_logs, format_job_output, format_logs, format_preflight
from biroute.slurm.run_folder import RunFolder, find_run
from biroute.slurm.status import among, run_state, status_of, survey
from biroute.slurm.status_text import format_status, format_table

LIMITS = Limits(max_restarts=3, max_crashes_at_same_step=2)


def attempt(**fields: Any) -> Attempt:
    return Attempt(1, began=0.0, job="7", **fields)


RUNNING = [Job("7", "RUNNING")]
OVER = {"ended": 1.0, "status": 1, "cause": "rank 3 died"}


@pytest.mark.parametrize(
    ("live", "attempts", "cancelled", "state"),
    [
        ([Job("7", "PENDING", reason="Resources")], [], False, "queued"),
        (RUNNING, [], False, "starting"),
        (RUNNING, [attempt()], False, "running"),
        (RUNNING, [attempt(**OVER, decision="requeue")], False, "starting"),
        ([Job("7", "COMPLETING")], [attempt()], False, "ending"),
        ([], [attempt(ended=1.0, status=0, decision="finished")], False, "finished"),
        ([], [attempt(ended=1.0, status=0, decision="finished")], True, "finished"),
        ([], [attempt(**OVER, decision="stop")], False, "stopped"),
        ([], [attempt(**OVER, decision="stop")], True, "cancelled"),
        ([], [], True, "cancelled"),
        ([], [], False, "lost"),
        ([], [attempt()], False, "lost"),
        ([], [attempt(**OVER, decision="requeue")], False, "lost"),
        (None, [attempt()], False, "unknown"),
        (None, [attempt(**OVER, decision="requeue")], False, "unknown"),
        (None, [attempt(**OVER, decision="stop")], False, "stopped"),
        (None, [], False, "unknown"),
    ],
)
def test_state_of_a_run(live: list[Job] | None, attempts: list[Attempt], cancelled: bool, state: str) -> None:
    assert run_state(live, attempts, cancelled=cancelled)[0] == state


@pytest.mark.parametrize(
    ("attempts", "job", "state", "words"),
    [
        ([], Job("7", "CANCELLED"), "cancelled", "job 7 ended as CANCELLED"),
        ([], Job("7", "FAILED", exit_code="0:53", nodes="n2"), "failed", "FAILED, exit code 0:53 on n2, before its"),
        ([attempt()], Job("7", "CANCELLED by 0"), "cancelled", "`biroute resume` continues it"),
        ([attempt()], Job("7", "NODE_FAIL", nodes="n1"), "lost", "job 7 ended as NODE_FAIL on n1 without recording"),
        ([attempt(**OVER, decision="requeue")], Job("7", "FAILED"), "lost", "but was not (job 7 ended as FAILED)"),
        ([attempt(**OVER, decision="stop")], Job("7", "FAILED"), "stopped", "rank 3 died"),
    ],
)
def test_what_slurm_says_of_a_job_that_is_gone(attempts: list[Attempt], job: Job, state: str, words: str) -> None:
    found, reason = run_state([], attempts, cancelled=False, last_job=job)
    assert found == state and words in reason


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Resources", "waits for free nodes (Resources)"),
        ("Priority", "other jobs are before it (Priority)"),
        ("None", "Slurm has not looked at it yet"),
        ("JobHeldUser", "held by its user: `scontrol release 7`; it does not begin by itself (JobHeldUser)"),
        ("launch failed requeued held", "Slurm could not start it and holds it: `scontrol release 7`; it does not"),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-2]", "nodes that it needs are down, reserved or in maintenance (Req"),
        ("(PartitionTimeLimit)", "asks for more time than its partition allows; it does not begin by itself"),
        ("QOSMaxWallDurationPerJobLimit", "asks for more than its account or QOS allows a job; it does not begin"),
        ("QOSMaxJobsPerUserLimit", "a limit of its account or QOS is used up (QOSMaxJobsPerUserLimit)"),
        ("AssocGrpCPUMinutesLimit", "a limit of its account or QOS is used up (AssocGrpCPUMinutesLimit)"),
        ("SomethingNew", "SomethingNew"),
    ],
)
def test_a_reason_of_slurm_in_words(reason: str, words: str) -> None:
    pending = Job("7", "PENDING", reason=reason, begins="2026-11-27T17:30:00")
    state, told = run_state([pending], [], cancelled=False)
    assert state == "queued" and told.startswith(words)
    assert told.endswith(", expected to begin 2026-11-27T17:30:00")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Submitted as job 7: one crashed attempt of two ranks, a second that runs; twelve of forty steps."""
    path = tmp_path / "runs" / "large"
    (path / "submission" / "code").mkdir(parents=True)
    (path / "submission" / "job.sbatch").write_text("#!/bin/bash\n")
    (path / "submission" / "config.yaml").write_text(f"train: {{run_dir: {path}, steps: 40}}\n")
    (path / "submission" / "jobs.jsonl").write_text('{"job_id": "7", "submitted": 0, "by": "submit"}\n')
    metrics = {"train/loss": 2.0, "throughput/tokens_per_second": 12_345.0, "time/step_seconds": 2.5}
    lines = [{"step": step, "time_ms": 0, "metrics": metrics} for step in (11, 12)]
    lines.append({"step": 12, "time_ms": 0, "metrics": {"heldout/loss": 2.0}})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first = begin_attempt(path, nodes=["n1", "n2"], world_size=2, job="7")
    logs = log_dir(path, first)
    write_failure(logs, Failure(1, "n2", time.time(), 11, "error", "ValueError: boom", "Traceback ...\nboom"))
    write_failure(logs, Failure(0, "n1", time.time() - 9, 11, "peer", "connection closed by peer"))
    log_file(logs, 0).write_text("step 1\nstep 2\n")
    end_attempt(path, first, End(1, "rank 1 on n2: ValueError: boom", 11, crash=True), LIMITS)
    second = begin_attempt(path, nodes=["n1", "n3"], world_size=2, job="7", restart=1)
    log_file(log_dir(path, second), 0).write_text("resumed after step 10\nstep 11\nstep 12\n")
    return RunFolder(path)


def test_status_of_a_running_run(run: RunFolder) -> None:
    job = Job("7", "RUNNING", run.script, time_left="1:00:00", nodes="n[1,3]")
    status = status_of(run, [Job("8", "RUNNING", Path("/elsewhere/job.sbatch")), job])
    assert (status.state, status.step, status.steps, status.tokens_per_second) == ("running", 12, 40, 12_345.0)
    assert status.seconds_left == pytest.approx(28 * 2.5)
    assert status.jobs == (job,)
    text = format_status(status)
    for part in ("step 12 of 40", "12.3k tokens/s", "1:10 left", "job 7 RUNNING, on n[1,3]", "1:00:00 to its time"):
        assert part in text
    assert "attempt 1, job 7 on n1, n2" in text
    assert "rank 1 on n2: ValueError: boom -> requeue" in text
    tree = json.loads(json.dumps(status.as_json()))
    assert tree["attempts"][0]["cause"] == "rank 1 on n2: ValueError: boom"
    assert tree["jobs"][0]["script"] == str(run.script)


def test_a_job_submitted_by_hand_is_known_by_its_script(run: RunFolder) -> None:
    by_hand = Job("9", "PENDING", run.script)
    assert run.jobs_in([by_hand]) == [by_hand]


def test_the_first_failing_rank_comes_first(run: RunFolder) -> None:
    text = format_logs(run, 1, rank=0, lines=5)
    assert text.index("rank 1 on n2: ValueError: boom") < text.index("step 2"), "rank 0 only lost its peer"
    newest = format_logs(run, None, rank=0, lines=2)
    assert "attempt 2" in newest
    assert newest.splitlines()[-2:] == ["step 11", "step 12"]
    with pytest.raises(UsageError, match=r"no attempt 5; it has 1, 2"):
        format_logs(run, 5, rank=0, lines=2)


def test_the_logs_of_preflight_and_job(run: RunFolder) -> None:
    with pytest.raises(UsageError, match="has no log of a check of its nodes"):
        format_preflight(run, 1, 5)
    with pytest.raises(UsageError, match="no output of a job yet"):
        format_job_output(run, 5)
    logs = log_dir(run.path, 1)
    (logs / "preflight-n1.log").write_text("first\nn1 is fine\n")
    (logs / "preflight-n2.log").write_text("Traceback\n")
    (logs / "preflight").mkdir()
    (logs / "preflight" / "n2.json").write_text('{"host": "n2", "problems": ["no space"]}')
    shown = format_preflight(run, 1, 1).splitlines()
    first, second = f"last lines of {logs}/preflight-n1.log:", f"last lines of {logs}/preflight-n2.log:"
    assert shown[1:] == ["node n2: no space", first, "n1 is fine", second, "Traceback"]
    (run.path / "logs" / "slurm-7.out").write_text("one\ntwo\n")
    assert format_job_output(run, 1) == f"last lines of {run.path}/logs/slurm-7.out:\ntwo"


def test_following_goes_from_attempt_to_attempt_to_the_end(run: RunFolder) -> None:
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if text == "step 12":  # the run goes on while it is watched
            end_attempt(run.path, 2, End(75, "SIGUSR1, stopped after step 12", 12), LIMITS)
            third = begin_attempt(run.path, nodes=["n1"], world_size=2, job="7", restart=2)
            log_file(log_dir(run.path, third), 0).write_bytes(b"step 40 \xff\n")
            end_attempt(run.path, third, End(0, "the last step is done", 40), LIMITS)

    follow_logs(run, rank=0, lines=1, say=say)
    assert said == [
        "==> attempt 2, job 7 on n1, n3 <==",
        "step 12",
        "attempt 2 ended: SIGUSR1, stopped after step 12 -> requeue",
        "==> attempt 3, job 7 on n1 <==",
        "step 40 \ufffd",
        "attempt 3 ended: the last step is done -> finished",
        "run large: finished",
    ]


def test_a_run_by_its_folder_or_configuration(run: RunFolder, tmp_path: Path) -> None:
    assert find_run(str(run.path)) == run
    assert find_run(str(run.path / "submission" / "config.yaml")) == run
    for target, message in (
        (str(tmp_path), "holds no run"),
        ("nowhere", "no such run folder, configuration or job"),
    ):
        with pytest.raises(UsageError, match=message):
            find_run(target)


def test_a_job_by_its_number_without_slurm(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert find_run("7") == run
    with pytest.raises(UsageError, match="scontrol: no such command"):
        find_run("8")


@pytest.mark.parametrize("act", [lambda run: cancel_run(run, now=False), resume_run], ids=["cancel", "resume"])
def test_nothing_is_done_with_a_strangers_run(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, act: Callable[[RunFolder], Any]
) -> None:
    """Its script would run in this user's name, and it may name any job of this user as its own."""
    ours = [Job("7", "RUNNING")]
    assert run.jobs_in(ours) == ours
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    monkeypatch.setattr(client, "queue", lambda: pytest.fail("Slurm is asked"))
    with pytest.raises(UsageError, match=r"runs/large belongs to \S+, who alone may \w+ this run"):
        act(run)
    assert run.jobs_in(ours) == []


def test_control_characters_are_shown_and_not_sent(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    from biroute.slurm.commands import logs, status

    evil = "\x1b]52;c;ZXZpbA==\x07 \x9b2J \u202etxt"
    number = begin_attempt(run.path, nodes=[f"n1{evil}"], world_size=1)
    log_file(log_dir(run.path, number), 0).write_text(f"loss 2{evil}\n")
    end_attempt(run.path, number, End(1, f"died of{evil}"), LIMITS)
    status([str(run.path)])
    logs(str(run.path))
    shown = capsys.readouterr().out
    assert shown.count("\\x1b]52;c;ZXZpbA==\\x07 \\x9b2J \\u202etxt") >= 4
    assert not set(shown) & set("\x1b\x07\x9b\u202e")


def test_one_unreadable_run_does_not_hide_the_others(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from biroute.slurm.commands import logs, status

    other = tmp_path / "runs" / "broken"
    (other / "attempts.jsonl").mkdir(parents=True)
    status([str(other), str(run.path)])
    shown = capsys.readouterr()
    assert "run large: " in shown.out
    assert f"run broken: {other} cannot be read" in shown.err
    for preflight, follow in ((False, False), (True, False), (False, True)):
        with pytest.raises(UsageError, match=r"^run broken: .*attempts\.jsonl: Is a directory; correct it"):
            logs(str(other), preflight=preflight, follow=follow)


def test_a_table_of_runs_newest_first(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sequence[str]] = []
    monkeypatch.setattr(client, "past_jobs", lambda ids: asked.append(ids) or [Job(ids[0], "FAILED", nodes="n2")])
    folders = []
    for number, name in enumerate(("old", "older")):
        folder = tmp_path / "runs" / name
        (folder / "submission").mkdir(parents=True)
        (folder / "submission" / "jobs.jsonl").write_text(f'{{"job_id": "{number + 1}"}}\n')
        os.utime(folder, (1e9 - number, 1e9 - number))
        folders.append(RunFolder(folder))
    queue = [Job("7", "RUNNING", run.script)]
    found, unreadable = survey([folders[1], run, folders[0]], queue)
    assert asked == [["2", "1"]] and unreadable == []  # one question for all
    assert [status.run for status in found] == ["large", "old", "older"]
    head, first, second, third = format_table(found).splitlines()
    assert head.split() == ["RUN", "STATE", "STEP", "TOKENS/S", "LEFT", "JOB", "SINCE", "WHY"]
    assert first.split()[:6] == ["large", "running", "12/40", "12.3k", "1:10", "7"]
    assert second.split()[:2] == ["old", "lost"] and "none has begun" in second
    assert third.split()[:3] == ["older", "failed", "2"] and "that node may not see the run folder" in third
    assert all(len(line) <= 60 for line in format_table(found, 60).splitlines())
    assert [status.run for status in among(found, ["running", "queued"])] == ["large"]
    with pytest.raises(UsageError, match=r"--state runing: no such state; choose of queued, starting, running"):
        among(found, ["runing"])


def test_a_local_run_without_a_sign_of_life_is_lost(tmp_path: Path) -> None:
    number = begin_attempt(tmp_path, nodes=["n1"], world_size=1)
    beat = Heartbeat(0, "n1", 1, time.time(), 3, "training")
    write_heartbeat(log_dir(tmp_path, number), beat)
    assert status_of(RunFolder(tmp_path), None).state == "running"
    write_heartbeat(log_dir(tmp_path, number), replace(beat, time=time.time() - 600))
    found = status_of(RunFolder(tmp_path), None)
    assert found.state == "lost" and "no sign of life for 10:00" in found.reason


def test_slurm_that_hangs_does_not_hold_up_what_is_known_without_it(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from biroute.slurm.commands import status

    for name in ("squeue", "sacct", "scontrol"):
        (tmp_path / name).write_text("#!/bin/sh\nexec sleep 60\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(client, "LOOK_SECONDS", 0.3)
    start = time.monotonic()
    status([str(run.path)])
    assert time.monotonic() - start < 10
    shown = capsys.readouterr()
    assert "run large: unknown (Slurm does not answer here)" in shown.out and "step 12 of 40" in shown.out
    assert "Slurm does not answer" in shown.err


def test_a_running_run_of_somebody_else_is_asked_for_by_its_jobs(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sequence[str]] = []

    def queue(job_ids: Sequence[str] = ()) -> list[Job]:
        asked.append(job_ids)
        return [Job("7", "RUNNING", run.script)]

    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    monkeypatch.setattr(client, "queue", queue)
    found = status_of(run, [])
    assert asked == [["7"]]
    assert (found.state, found.reason) == ("running", f"a run of {run.path.owner()}")


def test_logs_of_a_healthy_run_show_no_failure(run: RunFolder) -> None:
    newest = read_attempts(run.path)[-1]
    assert newest.ended is None
    log_file(log_dir(run.path, newest.number), 0).write_text("step 12 loss 2.0\n")
    write_heartbeat(log_dir(run.path, newest.number), Heartbeat(0, "n1", 1, time.time(), 12, "training"))
    shown = format_logs(run, None, 0, 5)
    assert "first failure" not in shown and "step 12 loss 2.0" in shown


def test_following_a_queued_run_says_what_it_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "submission").mkdir()
    (tmp_path / "submission" / "jobs.jsonl").write_text('{"job_id": "9"}\n')
    waiting = [[Job("9", "PENDING", reason="Resources")], []]  # then it is gone
    monkeypatch.setattr(client, "queue", lambda: waiting.pop(0) if waiting else [])
    monkeypatch.setattr(client, "past_jobs", lambda ids: [])
    monkeypatch.setattr(client, "find_job", lambda job_id: None)
    said: list[str] = []
    follow_logs(RunFolder(tmp_path), 0, 5, said.append)
    assert said[0] == "job 9 is pending: waits for free nodes (Resources); nothing is printed before it begins"
