"""`biroute scale` with real processes: two sizes, one parent run in MLflow, a report; then the same command again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from .conftest import biroute


@pytest.mark.slow
def test_two_sizes_are_children_of_one_run(config_file: Path, mlflow_database: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    database = Path(shutil.copy(mlflow_database, tmp_path / "runs" / "mlflow.db"))
    words = ["scale", config_file, "--ranks", "1,2", "--mode", "strong", "--steps", "5", "--hardware", "a100"]
    answer = biroute(*words, "--out", tmp_path / "out")
    assert answer.status == 0, answer.err
    values = json.loads((tmp_path / "out" / "scaling.json").read_text())
    assert [size["ranks"] for size in values["sizes"]] == [1, 2]
    assert [size["global_batch_size"] for size in values["sizes"]] == [4, 4]
    assert values["sizes"][0]["efficiency"] == 1.0
    for size in values["sizes"]:
        assert 0 < size["fastest_step_seconds"] <= size["step_seconds"]
        assert size["phase_seconds"]["forward"] > 0
        assert size["predicted"]["step_seconds"] > 0
    page = (tmp_path / "out" / "scaling.md").read_text()
    assert "![" in page and (tmp_path / "out" / "scaling.png").exists()

    client = MlflowClient(f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("biroute")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.data.tags.get("scaling.mode") == "strong"]
    children = {run.info.run_id: run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert set(children) == {size["mlflow_run_id"] for size in values["sizes"]} and len(runs) == 3
    assert parent.info.status == "FINISHED"
    for name, key in (("tokens_per_second", "tokens_per_second"), ("efficiency", "efficiency")):
        history = client.get_metric_history(parent.info.run_id, f"scaling/{name}")
        assert [(one.step, one.value) for one in history] == [(s["ranks"], s[key]) for s in values["sizes"]]
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {
        "scaling.json", "scaling.md", "scaling.png"
    }  # fmt: skip
    assert "| 2 | tensor=1 region=1 data=2" in parent.data.tags["mlflow.note.content"]
    child = children[values["sizes"][1]["mlflow_run_id"]].data.tags
    assert float(child["plan.step_seconds"]) == pytest.approx(values["sizes"][1]["predicted"]["step_seconds"], 1e-5)
    assert "| predicted |" in child["mlflow.note.content"] and "| measured |" in child["mlflow.note.content"]

    again = biroute(*words)
    assert again.status == 0, again.err
    assert "1 rank: finished" in again.out and "attempt" not in again.out
    assert len(client.search_runs([experiment.experiment_id])) == 3
    history = client.get_metric_history(parent.info.run_id, "scaling/efficiency")
    assert [one.step for one in history] == [1, 2]
