"""`make chaos`: Slurm kills ranks that take more memory than their job asked for, and the line says what helps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.slurm_cluster import Cluster
from helpers.slurm_runs import PROFILE, ClusterRun, losses, submit, write_run

from ..conftest import Answer

Command = Callable[..., Answer]


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_a_run_without_enough_memory_says_so_and_goes_on_with_more(
    cluster: Cluster, corpus: Path, tmp_path: Path, command: Command
) -> None:
    """A rank holds about 1 GiB when it has just started, and some 3 in a step."""
    config = write_run(
        corpus, tmp_path, "large", steps=2, parallel={"data": 2, "zero_stage": 1},
        model={"hidden_size": 768, "num_layers": 4, "sequence_length": 256},
        train={"global_batch_size": 16, "microbatch_size": 8, "evaluate_every": 0, "evaluate_sequences": 16},
        slurm={"max_crashes_at_same_step": 2},
    )  # fmt: skip
    run = submit(cluster, command, config, 2, profile=PROFILE + "memory_per_node: 1800M\n")
    run.wait_for_end()
    first, second = run.attempts
    assert "memory ran out; give the job more (memory_per_node of the cluster profile" in first.cause, run.story()
    assert (first.decision, second.decision) == ("requeue", "stop"), run.story()
    environment = {"SLURM_CONF": cluster.environment["SLURM_CONF"]}
    assert "memory ran out" in command("status", run.run_dir, **environment).out

    profile = tmp_path / "more.yaml"
    profile.write_text(PROFILE + "memory_per_node: 16000M\n")
    answer = command("resume", run.run_dir, f"slurm.profile={profile}", **environment)
    assert answer.status == 0, answer.err
    ClusterRun(cluster, run.run_dir, answer.out.split()[1].rstrip(",")).wait_for_end()
    assert run.attempts[-1].decision == "finished", run.story()
    assert set(losses(run.run_dir)) == {1, 2}
