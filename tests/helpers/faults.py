"""Faults for a run on the test cluster: each strikes once, at a moment of its own, and clears up behind itself."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import psutil

from biroute.launcher.attempts.failures import read_heartbeats
from biroute.launcher.attempts.run_files import log_dir
from helpers.slurm_cluster import wait_for
from helpers.slurm_runs import START_SECONDS, ClusterRun


@dataclass(frozen=True)
class Fault:
    """`moment` returns when it is time; `strike` returns what undoes it once the next attempt has begun."""

    name: str
    moment: Callable[[ClusterRun, Random], None]
    strike: Callable[[ClusterRun, Random], Callable[[], None]]


def rank_processes(run: ClusterRun) -> dict[int, int]:
    """Rank -> process id, as this machine sees it, of the ranks that run now."""
    config = str(run.run_dir / "submission" / "config.yaml")
    found = {}
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if "biroute.launcher.start.worker" in words and config in words and "python" in process.name():
                found[int(process.environ()["SLURM_PROCID"])] = process.pid
        except (psutil.Error, KeyError):
            continue
    return found


def _some_steps_later(run: ClusterRun, random: Random) -> None:
    """In mid-training: a random number of steps and some milliseconds after the attempt's first step."""
    run.wait_for_training(run.attempts[-1].number)
    run.wait_for_step(run.step() + random.randint(2, 10))
    time.sleep(random.random() * 0.1)


def _while(doing: str) -> Callable[[ClusterRun, Random], None]:
    def moment(run: ClusterRun, random: Random) -> None:
        _some_steps_later(run, random)
        logs = log_dir(run.run_dir, run.attempts[-1].number)
        deadline = time.monotonic() + START_SECONDS
        while not any(
            heartbeat.rank == 0 and heartbeat.doing.startswith(doing) for heartbeat in read_heartbeats(logs)
        ):
            assert time.monotonic() < deadline, f"rank 0 is never {doing}\n{run.story()}"
            time.sleep(0.005)

    return moment


def _in_a_save(run: ClusterRun, random: Random) -> None:
    _some_steps_later(run, random)
    deadline = time.monotonic() + START_SECONDS
    while not list((run.run_dir / "checkpoints").glob("*.partial")):
        assert time.monotonic() < deadline, f"no checkpoint is ever written\n{run.story()}"
        time.sleep(0.001)


def _while_starting(run: ClusterRun, random: Random) -> None:
    """Before the first step: the ranks are there and import or build."""
    wait_for(lambda: len(rank_processes(run)) == 2, START_SECONDS, "the ranks to start")
    time.sleep(random.random() * 3)


def _signal_script(run: ClusterRun, random: Random) -> Callable[[], None]:
    run.cluster.client("scancel", "--batch", "--signal=USR1", run.job_id)
    return lambda: None


def _preempt(run: ClusterRun, random: Random) -> Callable[[], None]:
    job = run.cluster.client(
        "sbatch", "--parsable", "-p", "high", f"-N{run.cluster.nodes}", "--exclusive", "--output=/dev/null",
        "--wrap", "sleep 5",
    )  # fmt: skip
    assert job.isdigit(), job
    return lambda: None


def _kill(number: int, *, all_ranks: bool) -> Callable[[ClusterRun, Random], Callable[[], None]]:
    def strike(run: ClusterRun, random: Random) -> Callable[[], None]:
        ranks = rank_processes(run)
        for rank in ranks if all_ranks else [random.choice(sorted(ranks))]:
            os.kill(ranks[rank], number)
        return lambda: None

    return strike


def _power_off(rank: int) -> Callable[[ClusterRun, Random], Callable[[], None]]:
    def strike(run: ClusterRun, random: Random) -> Callable[[], None]:
        node = run.node_of(rank)
        run.cluster.verb("power-off", node)
        return lambda: _bring_back(run, "power-on", node)

    return strike


def _cut(run: ClusterRun, random: Random) -> Callable[[], None]:
    node = run.node_of(1)
    run.cluster.verb("cut", node)
    return lambda: _bring_back(run, "heal", node)


def _bring_back(run: ClusterRun, verb: str, node: str) -> None:
    run.cluster.verb(verb, node)
    states = ("-t", "idle,mixed,allocated,completing")
    up = lambda: node in run.cluster.client("sinfo", "-h", "-N", *states, "-o", "%N").split()  # noqa: E731
    wait_for(up, 180, f"{node} to come back")


_TERM = _kill(signal.SIGTERM, all_ranks=True)
FIRST = Fault("TERM during warm-up", _while_starting, _TERM)
OTHERS = (
    Fault("USR1 before the limit", _some_steps_later, _signal_script),
    Fault("preemption", _some_steps_later, _preempt),
    Fault("power-off of a node", _some_steps_later, _power_off(1)),
    Fault("power-off of the first node", _some_steps_later, _power_off(0)),
    Fault("cut of a cable", _some_steps_later, _cut),
    Fault("kill -9 of one rank", _some_steps_later, _kill(signal.SIGKILL, all_ranks=False)),
    Fault("kill -9 of all ranks", _some_steps_later, _kill(signal.SIGKILL, all_ranks=True)),
    Fault("TERM during evaluation", _while("evaluating"), _TERM),
    Fault("TERM during a save", _in_a_save, _TERM),
)
