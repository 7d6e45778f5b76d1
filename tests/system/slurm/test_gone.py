"""`make chaos`: a run folder that was deleted ends its job; a node that does not see the folder is only left."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.slurm_cluster import Cluster, wait_for
from helpers.slurm_runs import PROFILE, ClusterRun, submit, write_run

from ..conftest import Answer
from ..test_cli_errors import assert_one_line

Command = Callable[..., Answer]


def shown(cluster: Cluster, job_id: str) -> str:
    """What Slurm shows of a job on one line."""
    return cluster.client("scontrol", "show", "job", "-o", job_id)


def wait_for_failure(run: ClusterRun) -> None:
    wait_for(lambda: "JobState=FAILED" in shown(run.cluster, run.job_id), 300, "the end of the job")


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_the_folder_of_a_job_is_deleted(cluster: Cluster, corpus: Path, tmp_path: Path, command: Command) -> None:
    on_login_node = {"SLURM_CONF": cluster.environment["SLURM_CONF"]}
    config = write_run(corpus, tmp_path, "queued", steps=8, parallel={})
    queued = submit(cluster, command, config, 1, profile=f"{PROFILE}sbatch_options: [--hold]\n")
    shutil.rmtree(queued.run_dir)
    for verb in ("status", "logs", "cancel", "resume"):
        for target in (queued.job_id, queued.run_dir, config):
            answer = command(verb, target, **on_login_node)
            assert_one_line(answer, str(queued.run_dir), "was deleted or moved", f"`scancel {queued.job_id}`")
    assert_one_line(command("submit", config, "slurm.profile=cpu", **on_login_node), f"`scancel {queued.job_id}`")
    # One that trains meanwhile, and loses its folder, too.
    config = write_run(corpus, tmp_path, "training", steps=100_000, parallel={}, train={"evaluate_every": 0})
    training = submit(cluster, command, config, 1)
    cluster.client("scontrol", "release", queued.job_id)
    training.wait_for_step(2)
    training.run_dir.rename(tmp_path / "elsewhere")
    for run in (queued, training):
        if run is training:
            cluster.client("scancel", "--batch", "--signal=USR1", run.job_id)
        wait_for_failure(run)
        # Ranks that still train may make the folder anew, without what it held.
        told = rf"Comment=BiRoute: ends, and is not queued again: {run.run_dir}(/submission)? was deleted or moved "
        assert re.search(told, shown(cluster, run.job_id))
        assert "Restarts=0" in shown(cluster, run.job_id) and "ExcNodeList=(null)" in shown(cluster, run.job_id)
        answer = command("status", run.job_id, **on_login_node)
        assert "was deleted or moved" in answer.out + answer.err and "scancel" not in answer.out + answer.err


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_a_first_node_that_does_not_see_the_folder(
    cluster: Cluster, corpus: Path, tmp_path: Path, command: Command
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    config = write_run(corpus, shared, "one", steps=4, parallel={})
    cluster.verb("exec", "node1", "mount", "-t", "tmpfs", "tmpfs", str(shared))
    try:
        run = submit(cluster, command, config, 1)  # on the first node that is free
        wait_for(lambda: "ExcNodeList=node1 " in shown(cluster, run.job_id), 300, "the job to leave node1")
        (status,) = json.loads(
            command("status", run.run_dir, "--json", SLURM_CONF=cluster.environment["SLURM_CONF"]).out
        )
        assert status["state"] == "queued"
        assert status["jobs"][0]["note"] == f"node node1 does not see {run.run_dir}"
        run.wait_for_end()
    finally:
        cluster.verb("exec", "node1", "umount", str(shared))
    (attempt,) = run.attempts
    assert attempt.decision == "finished" and "node1" not in attempt.nodes, run.story()
