"""Runs, experiments and databases that are deleted, renamed, restored or moved: each point is there exactly once."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.tracked import client_of, history, logged, make_config, state_of, troubles, until

from biroute.launcher.attempts.failures import End, Heartbeat, write_heartbeat
from biroute.launcher.attempts.journal import begin_attempt, end_attempt
from biroute.launcher.attempts.run_files import log_dir
from biroute.launcher.track import uploader
from biroute.launcher.track.sync import sync_run
from biroute.launcher.track.tracker import Tracker, open_tracker
from biroute.launcher.track.upload_state import DatasetFacts
from biroute.launcher.track.uploader import values_waiting

from .conftest import Answer

Command = Callable[..., Answer]


@pytest.fixture
def database(mlflow_database: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(mlflow_database, tmp_path / "mlflow.db"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploader, "_SEND_SECONDS", 0.05)
    monkeypatch.setattr(uploader, "_LONGEST_PAUSE_SECONDS", 0.5)
    monkeypatch.setattr(uploader, "_PERMANENT_PAUSE_SECONDS", 0.5)


def uri_of(database: Path) -> str:
    return f"sqlite:///{database}"


def opened(database: Path, run_dir: Path, said: list[str] | None = None, **tracking: Any) -> Tracker:
    return open_tracker(
        make_config(uri_of(database), **tracking),
        run_dir,
        tags={"layout": "tensor=1 data=2 zero=1"},
        headline="1.5 M parameters",
        datasets={"train": DatasetFacts(name="poems", digest="d1", source="/x", profile="9")},
        notify=([] if said is None else said).append,
    )


def log(tracker: Tracker, steps: range) -> None:
    for step in steps:
        tracker.log(step, {"train/loss": 1.0 / step, "progress/tokens": 100.0 * step})


def all_sent(run_dir: Path) -> bool:
    return state_of(run_dir)["sent_bytes"] == (run_dir / "metrics.jsonl").stat().st_size


def runs(database: Path) -> list[Any]:
    client = client_of(uri_of(database))
    return list(client.search_runs([one.experiment_id for one in client.search_experiments()]))


def test_the_run_of_mlflows_variable_is_named_and_left_alone(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = client_of(uri_of(database)).create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", other)
    run_dir, said = tmp_path / "run", []
    tracker = opened(database, run_dir, said)
    log(tracker, range(1, 4))
    tracker.close("FINISHED")
    assert sum("MLFLOW_RUN_ID is set and not used" in line for line in said) == 1
    assert state_of(run_dir)["run_id"] != other and history(uri_of(database), run_dir) == logged(run_dir)
    left = client_of(uri_of(database)).get_run(other)
    assert (left.info.status, left.data.metrics, left.data.params) == ("RUNNING", {}, {})


def test_a_long_name_is_cut_to_what_every_database_takes(database: Path, tmp_path: Path) -> None:
    """SQLite would take more; PostgreSQL refuses what is longer than its column, at each try."""
    run_dir, kept = tmp_path / ("f" * 245), "f" * 245 + " [dat"
    for status in ("KILLED", "FINISHED"):
        tracker = opened(database, run_dir)
        log(tracker, range(1, 4))
        tracker.close(status)
        (run,) = runs(database)
        assert (run.info.run_name, run.info.status) == (kept, status)
    with contextlib.closing(sqlite3.connect(database)) as tables:
        named = tables.execute("SELECT name, (SELECT value FROM tags WHERE key = 'mlflow.runName') FROM runs")
        assert named.fetchall() == [(kept, kept)]


def test_a_database_restored_from_a_backup_gets_what_it_lacks(database: Path, tmp_path: Path) -> None:
    run_dir, backup, said = tmp_path / "run", tmp_path / "backup.db", []
    first = opened(database, run_dir)
    log(first, range(1, 11))
    until(lambda: all_sent(run_dir))
    with (
        contextlib.closing(sqlite3.connect(database)) as source,
        contextlib.closing(sqlite3.connect(backup)) as target,
    ):
        source.backup(target)
    log(first, range(11, 31))
    first.close("FINISHED")
    assert all_sent(run_dir) and len(history(uri_of(database), run_dir)) == 30
    shutil.copy(backup, database)
    second = opened(database, run_dir, said)
    second.close("FINISHED")
    assert history(uri_of(database), run_dir) == logged(run_dir)
    assert len(logged(run_dir)) == 30
    assert "holds less of metrics.jsonl than was sent to it" in troubles(said)[0]


def test_an_experiment_deleted_and_restored_keeps_its_run(database: Path, tmp_path: Path) -> None:
    run_dir, said = tmp_path / "run", []
    tracker = opened(database, run_dir, said)
    log(tracker, range(1, 6))
    until(lambda: all_sent(run_dir))
    client, run_id = client_of(uri_of(database)), state_of(run_dir)["run_id"]
    experiment = client.get_run(run_id).info.experiment_id
    client.delete_experiment(experiment)
    log(tracker, range(6, 11))
    until(lambda: len(troubles(said)) == 1)
    assert "experiment 'biroute' is deleted there; restore it, or set tracking.experiment" in troubles(said)[0]
    client.restore_experiment(experiment)
    until(lambda: all_sent(run_dir))
    tracker.close("FINISHED")
    assert state_of(run_dir)["run_id"] == run_id and len(runs(database)) == 1
    assert history(uri_of(database), run_dir) == logged(run_dir)


def test_a_renamed_experiment_under_another_address_is_found(database: Path, tmp_path: Path) -> None:
    run_dir, said = tmp_path / "run", []
    first = opened(database, run_dir)
    log(first, range(1, 6))
    first.close("KILLED")
    client, run_id = client_of(uri_of(database)), state_of(run_dir)["run_id"]
    client.rename_experiment(client.get_run(run_id).info.experiment_id, "renamed")
    moved = Path(shutil.move(database, tmp_path / "moved.db"))
    second = opened(moved, run_dir, said)
    log(second, range(6, 11))
    second.close("FINISHED")
    assert state_of(run_dir)["run_id"] == run_id and len(runs(moved)) == 1
    assert history(uri_of(moved), run_dir) == logged(run_dir)
    assert "earlier attempts were sent to" in said[0]


def test_a_database_moved_in_mid_training_is_opened_anew(
    database: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir, said, empty = tmp_path / "run", [], tmp_path / "empty.db"
    shutil.copy(database, empty)
    tracker = opened(database, run_dir, said)
    log(tracker, range(1, 11))
    until(lambda: all_sent(run_dir))
    os.rename(database, tmp_path / "away.db")
    shutil.copy(empty, database)
    log(tracker, range(11, 21))
    until(lambda: len(runs(database)) == 1)
    tracker.close("FINISHED")
    assert history(uri_of(database), run_dir) == logged(run_dir) and len(logged(run_dir)) == 20
    assert "Traceback" not in capfd.readouterr().err
    assert "sqlite3" in (log_dir(run_dir, 1) / "mlflow.log").read_text()


def test_what_people_see_of_a_run(database: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    parent = client_of(uri_of(database)).create_run("0").info.run_id
    first = opened(database, run_dir, tags={"team": "nlp"}, group="sweep", parent=parent)
    log(first, range(1, 6))
    first.close("KILLED")
    client = client_of(uri_of(database))
    run = client.get_run(state_of(run_dir)["run_id"])
    assert run.info.run_name == "run [data 2]"
    tags = run.data.tags
    assert (tags["team"], tags["group"], tags["mlflow.parentRunId"]) == ("nlp", "sweep", parent)
    assert tags["mlflow.note.content"].startswith("1.5 M parameters\n")
    assert "| progress | step 5 of 100, 500 tokens |" in tags["mlflow.note.content"]
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest, dataset.tags[0].value) == ("poems", "d1", "train")
    about = client.get_experiment(run.info.experiment_id).tags["mlflow.note.content"]
    assert about.startswith("Runs of BiRoute.") and about.endswith("Newest: run [data 2]")
    client.set_tag(run.info.run_id, "mlflow.note.content", "mine")
    second = opened(database, run_dir)
    log(second, range(6, 9))
    second.close("FINISHED")
    run = client.get_run(run.info.run_id)
    assert run.data.tags["mlflow.note.content"] == "mine"
    assert len(run.inputs.dataset_inputs) == 1


def test_sync_sends_what_waits_and_says_where_it_is(database: Path, tmp_path: Path, command: Command) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    number = begin_attempt(run_dir, nodes=["n1"], world_size=1)
    (run_dir / "config.yaml").write_text(
        f"tracking: {{uri: '{uri_of(database)}'}}\ntrain: {{run_dir: '{run_dir}', steps: 100}}\n"
    )
    tracker = open_tracker(make_config("http://127.0.0.1:1", flush_seconds=0.5), run_dir, tags={}, notify=print)
    log(tracker, range(1, 11))
    picture = run_dir / "loss_curve.png"
    picture.write_bytes(b"x")
    tracker.log_artifact(picture)
    write_heartbeat(log_dir(run_dir, number), Heartbeat(0, "n1", 1, time.time(), 10, "training"))
    tracker.close("FINISHED")
    answer = command("track", "sync", run_dir)
    assert answer.status == 2 and "attempt 1 is training and sends its points itself" in answer.err
    end_attempt(run_dir, number, End(0, "the last step is done", 10), limits=None)
    assert "20 values wait for MLflow: `biroute track sync" in command("status", run_dir).out
    answer = command("track", "sync", run_dir, "nowhere")
    assert answer.status == 2 and "nowhere" in answer.err
    assert f"{run_dir}: 20 values and 1 files sent: `biroute ui" in answer.out
    (run,) = runs(database)
    assert run.info.status == "FINISHED" and run.data.tags["attempt.0001"].startswith("the last step is done")
    assert history(uri_of(database), run_dir) == logged(run_dir) and len(logged(run_dir)) == 10
    assert [file.path for file in client_of(uri_of(database)).list_artifacts(run.info.run_id)] == ["loss_curve.png"]
    again = command("track", "sync", run_dir)
    assert again.status == 0 and f"{run_dir}: 0 values and 0 files sent" in again.out
    assert "wait for MLflow" not in command("status", run_dir).out


def test_what_was_not_tracked_can_be_sent_later(database: Path, tmp_path: Path) -> None:
    run_dir, said = tmp_path / "run", list[str]()
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(
        f"tracking: {{uri: '{uri_of(database)}'}}\ntrain: {{run_dir: '{run_dir}', steps: 100}}\n"
    )
    untracked = opened(database, run_dir, enabled=False)
    log(untracked, range(1, 4))
    untracked.close("FINISHED")
    assert runs(database) == [] and values_waiting(run_dir) == 0
    assert sync_run(run_dir, said.append).values == 6
    (run,) = runs(database)
    assert run.info.run_name == "run [data 2]" and run.inputs.dataset_inputs[0].dataset.name == "poems"
    assert run.data.tags["mlflow.note.content"].startswith("1.5 M parameters\n")
    untracked = opened(database, run_dir, enabled=False)
    log(untracked, range(4, 6))
    untracked.close("FINISHED")
    assert sync_run(run_dir, said.append).values == 4 and len(runs(database)) == 1
    assert history(uri_of(database), run_dir) == logged(run_dir) and len(logged(run_dir)) == 5
    assert not [line for line in said if "earlier attempts" in line]
