"""The job of `biroute submit --evaluate` on a real cluster: it evaluates each checkpoint, and ends with the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.slurm_cluster import Cluster, wait_for
from helpers.slurm_runs import submit, write_run

_SECONDS = 240.0


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_checkpoints_are_evaluated_beside_the_training(
    cluster: Cluster, command: Callable[..., Any], corpus: Path, tmp_path: Path
) -> None:
    # All checkpoints stay, as a busy machine may train faster than it evaluates.
    config = write_run(corpus, tmp_path, "watched", steps=4, parallel={}, checkpoint={"every_steps": 2, "keep": 10})
    run = submit(cluster, command, config, 1, "--evaluate", "--evaluate-options", "--tasks loss --limit 2")
    (asked,) = (
        json.loads(line) for line in (run.run_dir / "submission" / "evaluations.jsonl").read_text().splitlines()
    )
    slurm = {"SLURM_CONF": str(cluster.directory / "slurm.conf")}
    assert f"evaluation job {asked['job_id']}" in command("status", run.run_dir, **slurm).out
    run.wait_for_end()

    def ended() -> bool:
        return not cluster.client("squeue", "-h", "-j", asked["job_id"])

    output = run.run_dir / "logs" / f"evaluate-{asked['job_id']}.out"
    try:
        wait_for(ended, _SECONDS, "the end of the evaluation")
    except AssertionError as error:
        raise AssertionError(
            f"{error}\n{run.story()}\n{output.read_text() if output.exists() else 'no output'}"
        ) from None
    kept = [json.loads(line) for line in (run.run_dir / "evaluations.jsonl").read_text().splitlines()]
    found = {one["step"] for one in kept if "evaluate/heldout/loss" in one["metrics"]}
    assert found == {2, 4} and "ended with status 0" in output.read_text()
