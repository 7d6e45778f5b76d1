"""A run on two nodes resumes automatically after a signal and after the loss of a node, as though undisturbed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.slurm_cluster import Cluster
from helpers.slurm_runs import losses, submit, train_undisturbed, write_run

from ..conftest import Answer
from ..test_train import only_run

Command = Callable[..., Answer]
STEPS, CHECKPOINT_EVERY = 160, 20


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_survives_a_signal_and_a_dead_node(
    cluster: Cluster, corpus: Path, tmp_path: Path, command: Command
) -> None:
    changes = {"checkpoint": {"every_steps": CHECKPOINT_EVERY}, "train": {"evaluate_every": 100, "log_every": 1}}
    parallel = {"data": 2, "zero_stage": 1}
    plain = write_run(corpus, tmp_path, "plain", steps=STEPS, parallel=parallel, **changes)
    undisturbed = train_undisturbed(plain)

    config = write_run(corpus, tmp_path, "disturbed", steps=STEPS, parallel=parallel, **changes)
    run = submit(cluster, command, config, 2)
    run.wait_for_step(25)
    cluster.client("scancel", "--batch", "--signal=USR1", run.job_id)  # as Slurm does before the time limit
    run.wait_for_training(2)
    run.wait_for_step(run.resumed_after(2) + 30)
    dead = run.node_of(1)
    cluster.verb("power-off", dead)
    run.wait_for_attempt(3)
    run.wait_for_end()

    first, second, third = run.attempts
    assert "USR1" in first.cause, run.story()
    assert (first.status, first.decision, third.decision) == (75, "requeue", "finished"), run.story()
    assert run.resumed_after(2) == first.step, "nothing is lost on a signal"
    assert dead in second.nodes
    assert dead not in third.nodes
    assert second.cause, "a lost node is told too"
    assert second.decision != "finished", run.story()
    assert second.step is not None
    assert second.step - run.resumed_after(3) <= CHECKPOINT_EVERY, "at most a checkpoint's interval is lost"

    assert losses(run.run_dir) == undisturbed, "bit for bit"
    assert sorted(losses(run.run_dir)) == list(range(1, STEPS + 1))
    mlflow_run, client = only_run(run.run_dir)
    assert mlflow_run.info.status == "FINISHED"
    history = client.get_metric_history(mlflow_run.info.run_id, "train/loss")
    assert [point.step for point in history] == list(range(1, STEPS + 1)), "each step once, in one run"

    on = {"SLURM_CONF": str(cluster.directory / "slurm.conf")}
    (status,) = json.loads(command("status", run.run_dir, "--json", **on).out)
    assert (status["state"], status["step"]) == ("finished", STEPS)
    assert [attempt["cause"] for attempt in status["attempts"]] == [first.cause, second.cause, third.cause]
