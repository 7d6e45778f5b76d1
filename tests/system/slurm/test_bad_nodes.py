"""Bad nodes: one on which a rank hangs, one without the shared folder."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.faults import rank_processes
from helpers.slurm_cluster import Cluster
from helpers.slurm_runs import losses, submit, train_undisturbed, write_run

from ..conftest import Answer
from ..test_train import only_run

Command = Callable[..., Answer]
STEPS = 40
PARALLEL = {"data": 2, "zero_stage": 1}


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_a_run_survives_a_hang_and_a_node_without_the_folder(
    cluster: Cluster, corpus: Path, tmp_path: Path, command: Command
) -> None:
    changes = {"train": {"hang_seconds": 30.0, "evaluate_every": 0}, "slurm": {"preflight_timeout_seconds": 90.0}}
    undisturbed = train_undisturbed(write_run(corpus, tmp_path, "plain", steps=STEPS, parallel=PARALLEL, **changes))

    config = write_run(corpus, tmp_path, "bad", steps=STEPS, parallel=PARALLEL, **changes)
    hidden = tmp_path / "runs" / "bad"
    hidden.mkdir(parents=True)
    cluster.verb("exec", "node2", "mount", "-t", "tmpfs", "tmpfs", str(hidden))
    try:
        run = submit(cluster, command, config, 2)
        run.wait_for_attempt(2)
    finally:
        cluster.verb("exec", "node2", "umount", str(hidden))
    run.wait_for_step(5)
    hung = run.node_of(1)
    os.kill(rank_processes(run)[1], signal.SIGSTOP)
    run.wait_for_end()

    first, second, third = run.attempts
    assert (first.decision, first.excluded) == ("requeue", ("node2",)), run.story()
    assert "node2" in first.cause
    assert "node2" not in second.nodes + third.nodes, "a bad node is not used again"
    assert second.cause.startswith(f"hang: rank 1 on {hung} did not reach "), run.story()
    assert (second.decision, third.decision) == ("requeue", "finished"), run.story()
    assert losses(run.run_dir) == undisturbed
    mlflow_run, _ = only_run(run.run_dir)
    assert mlflow_run.info.status == "FINISHED"
    for attempt in run.attempts:
        assert attempt.cause in mlflow_run.data.tags[f"attempt.{attempt.number:04d}"]
