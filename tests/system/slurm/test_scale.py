"""`biroute scale --slurm` on a real cluster: each size a job; the same command later collects what they measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.slurm_cluster import Cluster, wait_for
from helpers.slurm_runs import PROFILE, write_run
from mlflow import MlflowClient


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_sizes_are_jobs_and_their_results_collected(
    cluster: Cluster, command: Callable[..., Any], corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "cluster.yaml").write_text(PROFILE)
    slurm = {"profile": str(tmp_path / "cluster.yaml"), "ranks_per_node": 1}
    config = write_run(corpus, tmp_path, "small", steps=50, parallel={}, slurm=slurm)
    words = ["scale", config, "--ranks", "1,2", "--steps", "5", "--slurm", "--hardware", "a100"]
    words += ["--out", tmp_path / "out"]
    on_login_node = {"SLURM_CONF": cluster.environment["SLURM_CONF"]}
    first = command(*words, **on_login_node)
    assert first.status == 0, first.err
    said = [line for line in first.out.splitlines() if ": job " in line]
    jobs = [line.partition(": job ")[2].partition(",")[0] for line in said]
    assert [line.partition(":")[0] for line in said] == ["1 rank", "2 ranks"]
    assert [cluster.job(job)["NumNodes"] for job in jobs] == ["1", "2"]
    assert not (tmp_path / "out" / "scaling.json").exists(), "nothing is measured yet"

    folder = tmp_path / "runs" / "small-weak-scaling"
    outputs = lambda: "\n".join(path.read_text() for path in folder.glob("*/logs/slurm-*.out"))  # noqa: E731
    try:
        wait_for(lambda: not cluster.client("squeue", "-h", "-j", ",".join(jobs)), 600, "the end of both jobs")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{outputs()}") from None
    second = command(*words, **on_login_node)
    assert second.status == 0, f"{second.err}\n{outputs()}"
    assert "1 rank: finished" in second.out and "2 ranks: finished" in second.out and ": job " not in second.out

    sizes = json.loads((tmp_path / "out" / "scaling.json").read_text())["sizes"]
    assert [(size["ranks"], size["global_batch_size"]) for size in sizes] == [(1, 4), (2, 8)]
    page = (tmp_path / "out" / "scaling.md").read_text()
    for size in sizes:
        assert size["step_seconds"] > 0 and size["predicted"]["step_seconds"] > 0
    assert "predicted" in page, page
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    (parent,) = [run for run in runs if run.data.tags.get("scaling.mode") == "weak"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {run.info.run_id for run in children} == {size["mlflow_run_id"] for size in sizes} and len(runs) == 3
    assert {run.info.status for run in runs} == {"FINISHED"}
    history = client.get_metric_history(parent.info.run_id, "scaling/efficiency")
    found = sorted((one.step, one.value) for one in history)
    assert found == [(size["ranks"], size["efficiency"]) for size in sizes]
