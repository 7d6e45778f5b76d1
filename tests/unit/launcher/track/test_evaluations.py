"""Results of evaluations in MLflow: in the run's own run, each once, and nothing lost where MLflow is away."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from biroute.configs.load import config_from_tree
from biroute.configs.schema import RunConfig
from biroute.launcher.track.evaluations import evaluated, record_evaluation, send_evaluations
from biroute.launcher.track.mlflow_client import open_client, prepare_mlflow
from biroute.launcher.track.upload_state import TrackingState


class Run:
    """A run folder whose uploader has made an MLflow run."""

    def __init__(self, folder: Path, database: Path) -> None:
        self.folder, self.database = folder / "run", folder / "mlflow.db"
        self.folder.mkdir(parents=True)
        shutil.copy(database, self.database)
        uri = f"sqlite:///{self.database}"
        prepare_mlflow(uri, 5.0)
        self.client = open_client(uri)
        experiment = self.client.create_experiment("biroute")
        self.id = self.client.create_run(experiment).info.run_id
        state = TrackingState(self.folder / "tracking_state.json", f"{uri} biroute", run_id=self.id)
        state.home = str(self.folder.resolve())
        state.save()
        self.state = state
        self.said: list[str] = []

    def config(self, **tracking: Any) -> RunConfig:
        return config_from_tree({"train": {"run_dir": str(self.folder)}, "tracking": tracking}, "test")

    def record(self, step: int, **metrics: float) -> None:
        named = {f"evaluate/heldout/{name}": value for name, value in metrics.items()}
        record_evaluation(self.folder, step, named, self.said.append)

    def send(self, **tracking: Any) -> int:
        return send_evaluations(self.folder, self.config(**tracking), 5.0, self.said.append)

    def history(self, name: str = "loss") -> list[tuple[int, float]]:
        points = self.client.get_metric_history(self.id, f"evaluate/heldout/{name}")
        return sorted((one.step, one.value) for one in points)


@pytest.fixture
def run(tmp_path: Path, mlflow_database: Path) -> Run:
    return Run(tmp_path, mlflow_database)


def test_each_value_comes_once(run: Run) -> None:
    run.record(2, loss=3.0, error=float("nan"))
    assert run.send() == 1 and run.history() == [(2, 3.0)]
    assert len(run.said) == 1 and "1 values sent to MLflow: `biroute ui" in run.said[0]
    before = (run.folder / "tracking_state.json").read_bytes()
    assert run.send() == 0
    run.record(2, loss=3.0, perplexity=20.0)
    run.record(4, loss=2.5)
    assert run.send() == 2 and run.history() == [(2, 3.0), (4, 2.5)] and run.history("perplexity") == [(2, 20.0)]
    assert (run.folder / "tracking_state.json").read_bytes() == before  # it belongs to the attempt that trains


def test_another_value_of_the_same_name_is_said_and_the_first_one_stays(run: Run) -> None:
    run.record(2, loss=3.0)
    run.record(2, loss=3.5)
    assert evaluated(run.folder) == {2: {"evaluate/heldout/loss": 3.0}}
    assert run.said == [
        "step 2 has 1 results of the same names and other values already, such as evaluate/heldout/loss 3, now 3.5: "
        "the earlier ones stay; --name keeps both"
    ]


def test_a_database_from_a_backup_gets_what_it_lacks(run: Run) -> None:
    backup = run.database.with_name("backup.db")
    run.record(2, loss=3.0)
    run.send()
    shutil.copy(run.database, backup)
    run.record(4, loss=2.5)
    run.send()
    shutil.copy(backup, run.database)
    run.client = open_client(f"sqlite:///{run.database}", anew=True)
    assert run.history() == [(2, 3.0)]
    assert run.send() == 1 and run.history() == [(2, 3.0), (4, 2.5)]


def test_an_mlflow_that_is_away_is_one_line_and_gets_the_values_later(run: Run) -> None:
    run.record(2, loss=3.0)
    run.state.target = "http://127.0.0.1:1 biroute"
    run.state.save()
    assert run.send(uri="http://127.0.0.1:1") == 0
    assert len(run.said) == 1 and "Connection refused; results stay in evaluations.jsonl" in run.said[0]
    run.state.target = f"sqlite:///{run.database} biroute"
    run.state.save()
    assert run.send() == 1 and run.history() == [(2, 3.0)]


def test_where_there_is_no_run_of_its_own_nothing_is_sent(run: Run, tmp_path: Path) -> None:
    run.record(2, loss=3.0)
    assert run.send(enabled=False) == 0 and not run.said
    assert run.send(experiment="other") == 0 and "its MLflow run is not at" in run.said.pop()
    copy = tmp_path / "copy"
    shutil.copytree(run.folder, copy)
    assert send_evaluations(copy, run.config(uri=f"sqlite:///{run.database}"), 5.0, run.said.append) == 0
    assert f"is a copy of {run.folder}" in run.said.pop()
    (copy / "tracking_state.json").unlink()
    assert send_evaluations(copy, run.config(), 5.0, run.said.append) == 0
    assert "has no MLflow run yet" in run.said.pop()
    run.client.delete_run(run.id)
    assert run.send() == 0 and "is deleted; results stay" in run.said.pop()
