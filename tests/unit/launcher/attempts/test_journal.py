"""Attempts of a run: the journal, the fencing token, what is decided at an end, and who is named as its cause."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from biroute.configs.errors import FencedError, UsageError
from biroute.launcher.attempts.failures import (
    End,
    Failure,
    Heartbeat,
    explain_end,
    log_file,
    record_failure,
    record_stop,
    tail_of_log,
    write_failure,
    write_heartbeat,
)
from biroute.launcher.attempts.journal import (
    NO_END,
    Attempt,
    FencingToken,
    Limits,
    begin_attempt,
    decide,
    end_attempt,
    excluded_nodes,
    fencing_token_of,
    make_run_dir,
    read_attempts,
)
from biroute.launcher.attempts.run_files import log_dir
from biroute.slurm.job import said_during

LIMITS = Limits(max_restarts=3, max_crashes_at_same_step=2, max_restarts_without_progress=10)


@pytest.mark.parametrize("part", ["checkpoints", "logs"])
@pytest.mark.parametrize("place", ["/proc", "/dev/null"])
def test_parts_that_cannot_be_written_are_told_before_the_first_step(tmp_path: Path, part: str, place: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / part).symlink_to(place)
    with pytest.raises(UsageError, match=rf"run/{part}: nothing can be written there \(.*\); make it a folder that"):
        make_run_dir(tmp_path / "run")
    (tmp_path / "run" / part).unlink()
    make_run_dir(tmp_path / "run")
    (tmp_path / "run" / part).mkdir()
    make_run_dir(tmp_path / "run")
    assert list((tmp_path / "run").rglob("*")) == [tmp_path / "run" / part]


def crashed(number: int, step: int | None, job: str = "7") -> Attempt:
    return Attempt(number, 0.0, job, ended=1.0, status=1, cause="boom", step=step, crash=True)


def stopped(number: int, step: int | None) -> Attempt:
    return Attempt(number, 0.0, "7", ended=1.0, status=75, cause="time limit", step=step)


@pytest.mark.parametrize(
    ("end", "earlier", "decision", "reason"),
    [
        (End(0, "the last step is done"), [], "finished", "last step"),
        (End(75, "time limit", 4), [stopped(n, 4) for n in range(9)], "stop", "10 attempts in a row made no step"),
        (End(75, "time limit"), [stopped(n, None) for n in range(9)], "stop", "slurm.max_restarts_without_progress"),
        (End(75, "time limit", 5), [stopped(n, 4) for n in range(9)], "requeue", "time limit"),
        (End(75, "time limit", 5), [stopped(0, 4), *(stopped(n, 5) for n in range(8))], "requeue", "time limit"),
        (End(2, "no such file"), [], "stop", "no such file; fix it"),
        (End(75, "SIGUSR1, stopped after step 4"), [crashed(n, 4) for n in range(8)], "requeue", "SIGUSR1"),
        (End(143, "SIGTERM", crash=False), [crashed(n, 4) for n in range(8)], "requeue", "SIGTERM"),
        (End(1, "boom", 5, crash=True), [crashed(1, 4)], "requeue", "crash 2 of at most 4: boom"),
        (End(1, "boom", 5, crash=True), [crashed(1, 5)], "stop", "crash loop: 2 attempts ended after step 5"),
        (End(1, "boom", 9, crash=True), [crashed(n, n) for n in (1, 2, 3)], "stop", "slurm.max_restarts=3"),
        (End(1, "boom", None, crash=True), [crashed(1, None)], "stop", "2 attempts ended before the first step"),
        (End(1, "boom", None, crash=True), [crashed(1, 4)], "requeue", "crash 2"),
    ],
)
def test_decision(end: End, earlier: list[Attempt], decision: str, reason: str) -> None:
    found, why = decide(end, earlier, cancelled=False, limits=LIMITS)
    assert (found, reason in why) == (decision, True), why


def test_a_cancelled_run_is_not_queued_again() -> None:
    assert decide(End(75, "SIGTERM"), [], cancelled=True, limits=LIMITS)[0] == "stop"
    assert decide(End(0, "done"), [], cancelled=True, limits=LIMITS)[0] == "finished"
    off = replace(LIMITS, requeue=False)
    for end in (End(75, "SIGUSR1"), End(1, "boom", crash=True)):
        assert decide(end, [], cancelled=False, limits=off) == (
            "stop", f"{end.cause}; slurm.requeue is off: `biroute resume` continues it",
        )  # fmt: skip


def test_an_attempt_without_end_gets_one_when_the_next_begins(tmp_path: Path) -> None:
    assert begin_attempt(tmp_path, nodes=["n1", "n2"], world_size=4, job="7", restart=0) == 1
    write_heartbeat(log_dir(tmp_path, 1), Heartbeat(0, "n1", 1, time.time(), 12, "step"))
    assert begin_attempt(tmp_path, nodes=["n1", "n3"], world_size=4, job="7", restart=1) == 2
    first, second = read_attempts(tmp_path)
    assert (first.nodes, first.cause, first.step, first.crash) == (("n1", "n2"), NO_END, 12, False)
    assert first.status == -1
    assert (second.restart, second.ended, second.nodes) == (1, None, ("n1", "n3"))


def test_the_tail_of_a_log_of_any_bytes(tmp_path: Path) -> None:
    """A rank that is killed leaves half a character, and a library may print anything."""
    assert tail_of_log(tmp_path, 0) == ""
    log_file(tmp_path, 0).write_bytes(b"".join(b"line %d\n" % n for n in range(40)) + b"bad \xff\xe5 byte \xe5\xba")
    told = tail_of_log(tmp_path, 0).splitlines()
    assert told[0] == f"last lines of {log_file(tmp_path, 0)}:"
    assert len(told) == 1 + 25
    assert told[-2:] == ["  line 39", "  bad \ufffd\ufffd byte \ufffd"]


def test_the_fence_stops_the_older_attempt(tmp_path: Path) -> None:
    old = FencingToken(tmp_path, begin_attempt(tmp_path, nodes=[], world_size=1))
    with old.writing():
        pass
    new = FencingToken(tmp_path, begin_attempt(tmp_path, nodes=[], world_size=1))
    assert (old.holds(), new.holds()) == (False, True)
    with pytest.raises(FencedError, match=r"attempt 1 no longer owns .* attempt 2 does"), old.writing():
        pytest.fail("it wrote")
    assert end_attempt(tmp_path, 1, End(1, "late", crash=True), LIMITS)[0] == "stop"
    assert [attempt.cause for attempt in read_attempts(tmp_path)] == [NO_END, ""]


def begin_in_process(folder: str, answers: multiprocessing.Queue[int]) -> None:
    answers.put(begin_attempt(Path(folder), nodes=[], world_size=1))


def test_two_that_begin_at_once_get_different_numbers(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers: multiprocessing.Queue[int] = context.Queue()
    processes = [context.Process(target=begin_in_process, args=(str(tmp_path), answers)) for _ in range(8)]
    for process in processes:
        process.start()
    numbers = sorted(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert numbers == list(range(1, 9))
    assert fencing_token_of(tmp_path) == 8


def test_a_torn_journal_still_tells_the_rest(tmp_path: Path) -> None:
    begin_attempt(tmp_path, nodes=["n1"], world_size=1)
    journal = tmp_path / "attempts.jsonl"
    journal.write_bytes(journal.read_bytes() + b'not json \xff\n{"attempt": 1, "ev')
    assert begin_attempt(tmp_path, nodes=["n2"], world_size=1) == 2
    assert [(attempt.number, attempt.cause) for attempt in read_attempts(tmp_path)] == [(1, NO_END), (2, "")]


def test_the_first_end_stands_and_bad_nodes_add_up(tmp_path: Path) -> None:
    for node in ("n1", "n2"):
        number = begin_attempt(tmp_path, nodes=["n1", "n2"], world_size=2, job="7")
        end = End(1, f"preflight: node {node}", crash=True, excluded=(node,))
        assert end_attempt(tmp_path, number, end, LIMITS)[0] == "requeue"
        assert end_attempt(tmp_path, number, End(0, "fine"), LIMITS)[0] == "requeue"
    assert excluded_nodes(tmp_path, "7") == ["n1", "n2"]
    assert excluded_nodes(tmp_path, "8") == []


def test_limits_count_the_crashes_of_this_job_only(tmp_path: Path) -> None:
    """A run that is resumed under a new job has all its restarts again."""
    decisions = []
    for job in ("7", "7", "7", "7", "8", "8"):
        number = begin_attempt(tmp_path, nodes=["n1"], world_size=1, job=job)
        decisions.append(end_attempt(tmp_path, number, End(1, "boom", number, crash=True), LIMITS)[0])
    assert decisions == ["requeue", "requeue", "requeue", "stop", "requeue", "requeue"]


def test_a_second_end_in_the_journal_changes_nothing(tmp_path: Path) -> None:
    number = begin_attempt(tmp_path, nodes=["n1"], world_size=1)
    end_attempt(tmp_path, number, End(1, "the first", 4, crash=True), LIMITS)
    journal = tmp_path / "attempts.jsonl"
    record = json.loads(journal.read_text().splitlines()[-1])
    assert (record["event"], record["cause"]) == ("end", "the first")
    journal.write_text(journal.read_text() + json.dumps(record | {"cause": "the second", "step": 9}) + "\n")
    (attempt,) = read_attempts(tmp_path)
    assert (attempt.cause, attempt.step) == ("the first", 4)


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """Logs of an attempt in which three ranks have shown a heartbeat."""
    for rank in range(3):
        write_heartbeat(tmp_path, Heartbeat(rank, f"n{rank}", 1, 100.0, 7, "step"))
    return tmp_path


def fail(logs: Path, rank: int, seconds: float, kind: str, error: str = "boom") -> None:
    write_failure(logs, Failure(rank, f"n{rank}", seconds, 8, kind, error))  # type: ignore[arg-type]


def test_cause_is_the_earliest_failure_that_is_no_consequence(logs: Path) -> None:
    fail(logs, 0, 1.0, "peer", "RuntimeError: Connection closed by peer")
    fail(logs, 2, 3.0, "error", "ValueError: later")
    fail(logs, 1, 2.0, "error", "ValueError: boom")
    end = explain_end(logs, 1)
    assert (end.cause, end.step, end.crash) == ("rank 1 on n1: ValueError: boom", 8, True)


def test_cause_is_the_silent_rank_if_the_others_lost_their_connection(logs: Path) -> None:
    for rank in (0, 2):
        fail(logs, rank, 1.0, "peer")
    end = explain_end(logs, 143)
    assert end.cause.startswith("rank 1 on n1 ended without recording anything")
    assert "last seen at step 7" in end.cause
    assert (end.status, end.step, end.crash, end.excluded) == (143, 8, True, ())


def test_cause_where_no_rank_recorded_anything(logs: Path, tmp_path: Path) -> None:
    assert "ranks 0 on n0, 1 on n1, 2 on n2 ended without recording anything" in explain_end(logs, 137).cause
    assert explain_end(logs, 137).cause.endswith("the job ended by SIGKILL")
    nothing = explain_end(tmp_path / "nothing", 1)
    assert "before any rank" in nothing.cause
    assert nothing.crash


KILLED = "slurmstepd: error: Detected 1 oom_kill event in StepId=7.1. Some of the step tasks have been OOM Killed."


@pytest.mark.parametrize(
    ("job", "rank"),
    [
        ("srun: error: n1: task 1: Out Of Memory", ""),
        ("", KILLED),
        ("slurmstepd: error: Step 7.1 exceeded memory limit (2048 > 1024), being killed", ""),
        ("", "terminate called after throwing an instance of 'std::bad_alloc'"),
    ],
)
def test_a_rank_that_got_no_more_memory(logs: Path, job: str, rank: str) -> None:
    for number in (0, 2):
        fail(logs, number, 1.0, "peer")
    log_file(logs, 1).write_text(f"step 7\n{rank}\n")
    cause = explain_end(logs, 137, said=["srun: n1: task 1: Killed", job]).cause
    assert cause.startswith("rank 1 on n1 ended without recording anything (last seen at step 7): memory ran out; ")
    log_file(logs, 0).write_text("a document about the OOM-killer\n")  # of a rank that was not killed
    log_file(logs, 1).write_text("step 7\n")
    assert "memory" not in explain_end(logs, 137, said=["srun: n1: task 1: Killed"]).cause


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "the GPU's memory ran out; lower train."),
        ("NCCLError: Cuda failure 2 'out of memory'", "the GPU's memory ran out; lower train."),
        ("RuntimeError: DefaultCPUAllocator: can't allocate memory: you", "memory ran out; give the job more (mem"),
        ("OSError: [Errno 12] Cannot allocate memory", "memory ran out; give the job more (memory_per_node of"),
    ],
)
def test_an_error_about_memory_has_a_remedy(logs: Path, error: str, remedy: str) -> None:
    fail(logs, 1, 1.0, "error", error)
    assert explain_end(logs, 1).cause.startswith(f"rank 1 on n1: {error}: {remedy}")


def test_cause_of_a_stop(logs: Path) -> None:
    before = explain_end(logs, 75, "TERM")
    assert (before.cause, before.crash) == ("SIGTERM before training began", False)
    record_stop(logs, 12, "SIGUSR1")
    assert explain_end(logs, 75).cause == "SIGUSR1, stopped after step 12"


def test_a_signal_that_left_no_time_to_save_is_no_crash(logs: Path) -> None:
    assert not explain_end(logs, 143, "SIGTERM").crash
    fail(logs, 1, 1.0, "error")
    assert explain_end(logs, 143, "SIGTERM").crash


def test_cause_of_a_bad_node(logs: Path) -> None:
    for host, problems in (("n1", []), ("n2", ["clock 31 s ahead", "run folder not writable"])):
        path = logs / "preflight" / f"{host}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"host": host, "problems": problems}))
    end = explain_end(logs, 1)
    assert (end.status, end.crash, end.excluded) == (1, True, ("n2",))
    assert end.cause == "preflight: node n2: clock 31 s ahead, run folder not writable"


def test_a_node_on_which_the_preflight_did_not_even_begin_is_bad(tmp_path: Path) -> None:
    logs = tmp_path
    (logs / "preflight").mkdir(parents=True)
    assert explain_end(logs, 2, nodes=["n1", "n2"]).excluded == ()  # on none: that is no single node's fault
    (logs / "preflight" / "n1.json").write_text('{"host": "n1", "problems": []}')
    end = explain_end(logs, 2, nodes=["n1", "n2"])
    assert (end.excluded, end.crash) == (("n2",), True)
    assert end.cause == "preflight: node n2: BiRoute's Python did not start there"
    write_heartbeat(logs, Heartbeat(0, "n1", 1, 1.0, 5, "training"))  # the ranks came so far: something else is wrong
    assert explain_end(logs, 2, nodes=["n1", "n2"]).excluded == ()


def test_kinds_of_failure(tmp_path: Path) -> None:
    gloo = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3411"
    record_failure(tmp_path, 0, 3, RuntimeError(gloo))
    record_failure(tmp_path, 1, 3, ZeroDivisionError("division by zero"))
    record_failure(tmp_path, 2, 3, RuntimeError("NCCL communicator was aborted on rank 2. ncclRemoteError: ..."))
    kinds = [json.loads(path.read_text())["kind"] for path in sorted((tmp_path / "failures").iterdir())]
    assert kinds == ["peer", "error", "peer"]
    record_failure(tmp_path, 1, 3, RuntimeError("another, later"))
    assert "division by zero" in explain_end(tmp_path, 1).cause, "the first failure of a rank stays"


def attempt_job(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "biroute.slurm.job", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ({"max_crashes_at_same_step": 2}, "crash loop: 2 attempts ended after step 8"),
        ({"max_restarts": 1}, "2 attempts crashed"),
        ({"max_restarts_without_progress": 2}, "2 attempts in a row made no step"),
    ],
)
def test_what_the_batch_script_calls(tmp_path: Path, limit: dict[str, int], reason: str) -> None:
    """Two crashes stop the job; the numbers and words on standard output are the script's."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"slurm": limit}))
    slurm = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "4"}
    for attempt, word in ((1, "requeue"), (2, "stop")):
        begun = attempt_job("begin", tmp_path, **slurm, SLURM_RESTART_COUNT=str(attempt - 1))
        assert (begun.returncode, begun.stdout) == (0, f"{attempt}\n"), begun.stderr
        fail(log_dir(tmp_path, attempt), 1, time.time(), "error", "ValueError: boom")
        ended = attempt_job("end", tmp_path, attempt, 1, **slurm)
        assert (ended.returncode, ended.stdout) == (0, f"{word}\n"), ended.stderr
        assert "rank 1 on n1: ValueError: boom" in ended.stderr
    assert reason in ended.stderr
    assert read_attempts(tmp_path)[1].nodes == ("n1", "n2")
    assert attempt_job("excluded", tmp_path, **slurm).stdout == "\n"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    answer = attempt_job("begin", tmp_path / "gone", SLURM_JOB_ID="1")
    assert answer.returncode == 2
    assert len(answer.stderr.splitlines()) == 1
    assert "gone" in answer.stderr


def test_what_slurm_said_is_that_of_the_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert said_during(tmp_path, 1) == []
    (tmp_path / "logs").mkdir()
    lines = [f"[job 7, start {n}] attempt {n} on n1, logs\nsrun: error: of {n}" for n in (1, 2)]
    (tmp_path / "logs" / "slurm-7.out").write_text("\n".join(lines) + "\n")
    assert [line[-4:] for line in said_during(tmp_path, 2)] == ["logs", "of 2"]
