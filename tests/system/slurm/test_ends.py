"""`make chaos`: ways in which Slurm ends a job, or a node fails to begin one; the run goes on, bit for bit."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.faults import rank_processes
from helpers.slurm_cluster import Cluster, wait_for
from helpers.slurm_runs import PROFILE, ClusterRun, losses, submit, train_undisturbed, write_run

from biroute.launcher.ranks.environment import port_of_job

from ..conftest import Answer

Command = Callable[..., Answer]
STEPS = 260
REQUEUED = (
    "queued again by Slurm or an administrator (SIG"  # TERM from Slurm or USR1 from the script, whichever is first
)
# The interpreter of the ranks and of the journal; it is missing on the nodes that the file beside it names.
PYTHON = """#!/bin/bash
if grep -qsx "$SLURMD_NODENAME" "$0.missing"; then exit 127; fi
exec {python} "$@"
"""
# scontrol, where the controller does not answer as often as the file beside it says.
SCONTROL = """#!/bin/bash
left=$(cat "$0.failures" 2>/dev/null || echo 0)
if [ "$1" = requeue ] && [ "$left" -gt 0 ]; then
    echo $((left - 1)) >"$0.failures"
    echo "Unable to contact slurm controller (connect failure)" >&2
    exit 1
fi
exec /usr/bin/scontrol "$@"
"""


CHANGES: dict[str, Any] = {
    "checkpoint": {"every_steps": 10},
    "train": {"evaluate_every": 0, "log_every": 1},
    "slurm": {"max_restarts": 20, "max_crashes_at_same_step": 5, "preflight_timeout_seconds": 30.0},
}
PARALLEL = {"data": 2, "zero_stage": 1}


class Ends:
    """A run on the cluster, the folder of its programs, and what was seen of each end."""

    def __init__(self, cluster: Cluster, programs: Path, run: ClusterRun, command: Command) -> None:
        self.cluster, self.programs, self.run, self.command = cluster, programs, run, command
        self.seen: list[tuple[str, str]] = []

    def then(self, name: str, strike: Callable[[], None], cause: str, *, training: bool = True) -> None:
        """Train some steps, strike, wait for the next attempt; the attempt that was struck ended with `cause`."""
        number = self.run.attempts[-1].number
        if training:
            self.run.wait_for_training(number)
            self.run.wait_for_step(self.run.step() + 3)
        strike()
        self.run.wait_for_attempt(number + 1)
        struck = self.run.attempts[number - 1]
        assert cause in struck.cause, f"{name}: {struck.cause}\n{self.run.story()}"
        assert struck.decision in ("requeue", None), self.run.story()
        self.seen.append((name, struck.cause))

    def status(self) -> str:
        return self.command("status", self.run.run_dir, SLURM_CONF=self.cluster.environment["SLURM_CONF"]).out

    def slurm(self, *arguments: str) -> None:
        self.cluster.client(*arguments)

    def requeue(self) -> None:
        self.slurm("scontrol", "requeue", self.run.job_id)


@contextmanager
def listening(cluster: Cluster, port: int) -> Iterator[None]:
    """Take a port on every node."""
    listen = f"s = socket.socket(); s.setsockopt(1, 2, 1); s.bind(('', {port})); s.listen()"
    code = f"import socket, time; {listen}; time.sleep(600)"
    nodes = [f"node{number}" for number in range(1, cluster.nodes + 1)]
    for node in nodes:
        cluster.verb(
            "exec", node, "sh", "-c", f'{sys.executable} -c "{code}" >/dev/null 2>&1 & echo $! >/tmp/{node}.listens'
        )
    yield
    for node in nodes:
        cluster.verb(
            "exec", node, "sh", "-c", f"kill $(cat /tmp/{node}.listens); rm /tmp/{node}.listens", check=False
        )


def freeze_a_rank(ends: Ends) -> None:
    """No time to save: the job is at its limit while a rank does nothing."""
    os.kill(rank_processes(ends.run)[1], signal.SIGSTOP)
    ends.slurm("scontrol", "update", f"JobId={ends.run.job_id}", "TimeLimit=1")


def preempt_without_grace(ends: Ends) -> None:
    ends.slurm("scontrol", "update", "PartitionName=main", "PreemptMode=CANCEL", "GraceTime=0")
    job = ends.cluster.client("sbatch", "--parsable", "-p", "high", "-N", str(ends.cluster.nodes), "--exclusive",
                              "-t", "1", "-o", "/dev/null", "--wrap", "sleep 5")  # fmt: skip
    wait_for(lambda: ends.cluster.job(job).get("JobState") in ("COMPLETED", None), 300, "the other job to end")
    ends.slurm("scontrol", "update", "PartitionName=main", "PreemptMode=REQUEUE", "GraceTime=15")


def hold_and_release(ends: Ends) -> None:
    ends.slurm("scontrol", "requeuehold", ends.run.job_id)
    wait_for(lambda: "held" in ends.status(), 120, "the status to say that the job is held")
    ends.slurm("scontrol", "release", ends.run.job_id)


def begin(cluster: Cluster, corpus: Path, folder: Path, command: Command) -> Ends:
    """Submit a run whose interpreter and scontrol can be told to fail."""
    programs = folder / "bin"
    programs.mkdir()
    for name, text in (("python", PYTHON.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    profile = PROFILE + f"python: {programs}/python\nsetup: ['export PATH={programs}:$PATH']\n"
    config = write_run(corpus, folder, "ends", steps=STEPS, parallel=PARALLEL, **CHANGES)
    run = submit(cluster, command, config, 2, profile=profile)
    run.wait_for_attempt(1)
    return Ends(cluster, programs, run, command)


def end_by_slurm(ends: Ends) -> None:
    """Ends that Slurm or an administrator brings about."""

    def controller_away() -> None:
        (ends.programs / "scontrol.failures").write_text("2")
        ends.slurm("scancel", "--batch", "--signal=USR1", ends.run.job_id)

    ends.then("requeue by an administrator", ends.requeue, REQUEUED)
    ends.then("requeue and hold by an administrator, release", lambda: hold_and_release(ends), REQUEUED)
    ends.then("USR1; scontrol requeue fails twice", controller_away, "SIGUSR1, stopped after step")
    assert (ends.programs / "scontrol.failures").read_text().strip() == "0"
    ends.then("time limit, a rank frozen", lambda: freeze_a_rank(ends), "time limit")
    ends.slurm("scontrol", "update", f"JobId={ends.run.job_id}", "TimeLimit=120")
    ends.then("preemption by cancelling, without grace", lambda: preempt_without_grace(ends), "preempted")


def end_by_a_node_without_python(ends: Ends) -> None:
    """The interpreter is missing on the second node of a job, and then on its first."""
    run = ends.run
    missing = ends.programs / "python.missing"

    def missing_on(node: str) -> None:
        missing.write_text(f"{node}\n")
        ends.requeue()

    def missing_at_the_next_start() -> None:
        ends.requeue()
        wait_for(lambda: ends.cluster.job(run.job_id).get("JobState") == "PENDING", 120, "the job to be queued")
        missing.write_text(f"{first}\n")

    run.wait_for_training(run.attempts[-1].number)
    second = run.attempts[-1].nodes[1]
    ends.then("requeue; Python missing on the second node", lambda: missing_on(second), REQUEUED)
    ends.then(f"Python missing on {second}", lambda: None, "Python did not start there", training=False)
    assert second not in run.attempts[-1].nodes
    run.wait_for_training(run.attempts[-1].number)
    first = run.attempts[-1].nodes[0]
    ends.then("requeue; Python missing on the batch host", missing_at_the_next_start, REQUEUED)
    assert first not in run.attempts[-1].nodes and f"left node {first}, which cannot start" in ends.status()
    ends.seen.append(("Python missing on the batch host", "no attempt; left-nodes names it"))


def end_by_a_port_that_is_taken(ends: Ends) -> None:
    run = ends.run
    run.wait_for_training(run.attempts[-1].number)
    with listening(ends.cluster, port_of_job(int(run.job_id), 1, run.attempts[-1].number + 1)):
        ends.then("requeue; the next port is taken", ends.requeue, REQUEUED)
        ends.then("the port is taken", lambda: None, "is in use; the next attempt uses another port", training=False)


def cancel_and_resume(ends: Ends) -> None:
    """Cancel the run, submit it again, and wait for its end."""
    run = ends.run
    run.wait_for_training(run.attempts[-1].number)
    ends.slurm("scancel", run.job_id)
    run.wait_for_end()
    assert "cancelled" in ends.status() and run.attempts[-1].decision == "stop", run.story()
    ends.seen.append(("scancel, then `biroute resume`", run.attempts[-1].cause))
    answer = ends.command("resume", run.run_dir, SLURM_CONF=ends.cluster.environment["SLURM_CONF"])
    assert answer.status == 0, answer.err
    ClusterRun(ends.cluster, run.run_dir, answer.out.split()[1].rstrip(",")).wait_for_end(900)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_every_end_of_a_job_is_told_and_survived(
    cluster: Cluster, corpus: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = begin(cluster, corpus, tmp_path, command)
    run = ends.run
    end_by_slurm(ends)
    end_by_a_node_without_python(ends)
    end_by_a_port_that_is_taken(ends)
    cancel_and_resume(ends)
    with capsys.disabled():
        print(*(f"| {name} | {cause} |" for name, cause in ends.seen), sep="\n", flush=True)
    assert run.attempts[-1].decision == "finished", run.story()
    undisturbed = train_undisturbed(write_run(corpus, tmp_path, "plain", steps=STEPS, parallel=PARALLEL, **CHANGES))
    assert losses(run.run_dir) == undisturbed, "bit for bit"
