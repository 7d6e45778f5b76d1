"""Attempts of `biroute train` with real processes: stopped in warm-up, hung, and overtaken by the next one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.job import points_of, until
from helpers.ports import claim_port

from biroute.launcher.attempts.failures import read_heartbeats
from biroute.launcher.attempts.journal import read_attempts
from biroute.launcher.attempts.run_files import UPLOAD_STATE, log_dir
from biroute.launcher.track.upload_state import read_state

from .conftest import Answer
from .test_train import only_run

Command = Callable[..., Answer]
TWO_RANKS = ("parallel.data=2", "tracking.enabled=false", "train.evaluate_every=0")


def ranks_of(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """Rank -> process, once both are there."""
    found: dict[int, psutil.Process] = {}

    def both() -> bool:
        for child in psutil.Process(process.pid).children():
            with contextlib.suppress(psutil.Error, KeyError):  # just forked, it is still the launcher
                found[int(child.environ()["RANK"])] = child
        return len(found) == 2

    until(both)
    return found


def test_stopped_before_training_begins(config_file: Path, run_dir: Path, start: Any) -> None:
    """Once as soon as the ranks are there, once while they import torch: status 75 and nothing to repair."""
    early = start(*TWO_RANKS)
    ranks_of(early)
    early.send_signal(signal.SIGTERM)
    out, err = early.communicate(timeout=120)
    assert early.returncode == 75, (out, err)
    assert "before training began; nothing is lost" in err

    later = start(*TWO_RANKS)
    until(lambda: len(read_heartbeats(log_dir(run_dir, 2))) == 2)
    later.send_signal(signal.SIGUSR1)
    out, err = later.communicate(timeout=120)
    assert later.returncode == 75, (out, err)

    causes = [attempt.cause for attempt in read_attempts(run_dir)]
    assert causes == ["SIGTERM before training began", "SIGUSR1 before training began"]
    assert not (run_dir / "checkpoints").exists()


def test_a_hang_names_the_missing_rank(run_dir: Path, start: Any) -> None:
    process = start(*TWO_RANKS, "train.steps=100000", "checkpoint.every_steps=0", "train.hang_seconds=15")
    until(lambda: len(points_of(run_dir)) >= 2)
    ranks = ranks_of(process)
    ranks[1].suspend()
    out, err = process.communicate(timeout=240)
    assert process.returncode == 1, (out, err)
    host = socket.gethostname()
    named = f"hang: rank 1 on {host} did not reach "
    assert named in err
    assert "it is stopped or its node is lost" in err
    assert "Thread 0x" in err, "rank 0 shows its stacks"
    assert not [rank for rank in ranks.values() if rank.is_running()], "no rank is left behind"

    (attempt,) = read_attempts(run_dir)
    assert attempt.cause.startswith(named)
    assert "all_reduce" in attempt.cause or "backward" in attempt.cause, attempt.cause
    assert attempt.crash
    failure = json.loads((log_dir(run_dir, 1) / "failures" / "rank-00000.json").read_text())
    assert failure["kind"] == "hang"
    assert "trainer.py" in failure["traceback"]


def content_of(folder: Path) -> dict[str, str]:
    """Path -> hash of every file, without what the first attempt's own ranks wrote."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and "attempt-0001" not in path.parts
    }


def suspend_outside_of_sqlite(ranks: dict[int, psutil.Process], database: Path) -> None:
    """Suspend all ranks while none reads or writes the database: their lock would keep every other process out."""

    def done() -> bool:
        for rank in ranks.values():
            rank.suspend()
        until(lambda: all(rank.status() == psutil.STATUS_STOPPED for rank in ranks.values()))
        with contextlib.closing(sqlite3.connect(database, timeout=0.5)) as connection:
            try:
                connection.execute("BEGIN EXCLUSIVE")  # a reader's lock stops writers, too, when they commit
                return True
            except sqlite3.OperationalError:
                for rank in ranks.values():
                    rank.resume()
                return False

    until(done)


def test_an_attempt_that_was_overtaken_writes_nothing(
    config_file: Path, run_dir: Path, start: Any, command: Command
) -> None:
    """What a lost node is: its ranks stand still, another attempt finishes the run, then they move again."""
    first = start("parallel.data=2", "train.steps=100000", "checkpoint.every_steps=2", "train.evaluate_every=0")
    # Three steps are done, and MLflow has the first: while a rank makes the run there, it holds a lock.
    until(lambda: len(points_of(run_dir)) >= 3 and read_state(run_dir / UPLOAD_STATE).sent_bytes)
    ranks = ranks_of(first)
    suspend_outside_of_sqlite(ranks, run_dir.parent / "mlflow.db")
    last = points_of(run_dir)[-1][0] + 3

    second = command("train", config_file, "parallel.data=2", f"train.steps={last}", "train.evaluate_every=0")
    assert second.status == 0, second.err
    assert "all is sent" in second.out, second.out
    before = content_of(run_dir)
    for rank in ranks.values():
        rank.resume()
    _, err = first.communicate(timeout=120)
    assert first.returncode == 1
    assert "attempt 1 no longer owns" in err
    time.sleep(1.0)  # for a thread that would still send something
    assert content_of(run_dir) == before
    assert [step for step, _ in points_of(run_dir)] == list(range(1, last + 1)), "each step once"
    run, client = only_run(run_dir)
    assert run.info.status == "FINISHED", "the older attempt has told MLflow of its end"
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == last


@pytest.mark.parametrize("starter", ["by hand", "torchrun"])
def test_ranks_that_others_started(config_file: Path, run_dir: Path, starter: str) -> None:
    """As docs/running.md says, on two "machines" of one rank; the ranks themselves keep the record."""
    port = claim_port()
    ours = ["-m", "biroute.launcher.start.worker", str(config_file), *TWO_RANKS, "train.steps=3"]
    ranks = []
    for rank in range(2):
        variables, arguments = {"OMP_NUM_THREADS": "1"}, [sys.executable]
        if starter == "torchrun":
            address = f"--nnodes=2 --nproc-per-node=1 --node-rank={rank} --master-addr=127.0.0.1 --master-port={port}"
            arguments += ["-m", "torch.distributed.run", *address.split()]
        else:
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
        environment = {**os.environ, **variables}
        ranks.append(subprocess.Popen([*arguments, *ours], env=environment, stderr=subprocess.PIPE, text=True))
    for process in ranks:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    (attempt,) = read_attempts(run_dir)
    assert (attempt.world_size, attempt.status, attempt.cause) == (2, 0, "the last step is done")
    assert attempt.nodes == (socket.gethostname(),)
    assert attempt.step == 3


def test_a_rank_without_an_address(config_file: Path) -> None:
    arguments = [sys.executable, "-m", "biroute.launcher.start.worker", str(config_file)]
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2"}
    answer = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert answer.returncode == 2
    assert answer.stderr.splitlines() == [
        "error: RANK is set but MASTER_ADDR is not; set MASTER_ADDR and MASTER_PORT, or unset RANK"
    ]
