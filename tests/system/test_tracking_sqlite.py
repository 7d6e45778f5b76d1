"""Tracking into a real SQLite file by attempts that end and begin: no point is lost or comes twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from helpers.tracked import client_of, history, logged, make_config, state_of, timed_log, until

from biroute.configs.load import config_from_tree
from biroute.launcher.track.metrics_log import read_points
from biroute.launcher.track.tracker import open_tracker

DIE_WITH_UNSENT_POINTS = """
import os, signal, sys, time
from pathlib import Path
from biroute.configs.load import config_from_tree
from biroute.launcher.track.tracker import open_tracker
run_dir = Path(sys.argv[1])
tracker = open_tracker(config_from_tree({"train": {"steps": 100}}, "child"), run_dir, tags={})
for step in range(1, 51):
    tracker.log(step, {"train/loss": 1.0 / step})
state = run_dir / "tracking_state.json"
while '"sent_bytes": 0' in state.read_text():
    time.sleep(0.05)
for step in range(51, 101):
    tracker.log(step, {"train/loss": 1.0 / step})
os.kill(os.getpid(), signal.SIGKILL)
"""


LOG_AND_CLOSE = """
import sys, time
from pathlib import Path
from biroute.configs.load import config_from_tree
from biroute.launcher.track.tracker import open_tracker
config = config_from_tree({"tracking": {"flush_seconds": 60}}, "child")
tracker = open_tracker(config, Path(sys.argv[1]), tags={})
for step in range(1, 301):
    tracker.log(step, {"train/loss": 1.0 / step, "optim/grad_norm": 1.0})
    time.sleep(0.01)
tracker.close("FINISHED")
"""


def default_uri(run_dir: Path) -> str:
    return f"sqlite:///{run_dir.parent}/mlflow.db"


def test_killed_process_leaves_its_points_to_the_next_attempt(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    child = subprocess.run([sys.executable, "-c", DIE_WITH_UNSENT_POINTS, str(run_dir)], timeout=120, check=False)
    assert child.returncode == -signal.SIGKILL
    before = state_of(run_dir)
    assert 0 < before["sent_bytes"] < (run_dir / "metrics.jsonl").stat().st_size
    assert client_of(default_uri(run_dir)).get_run(before["run_id"]).info.status == "RUNNING"
    # As if the kill had come between sending a batch and noting it: all is sent again, nothing is doubled.
    (run_dir / "tracking_state.json").write_text(json.dumps(before | {"sent_bytes": 0}))
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 101, "time_ms": 17')
    tracker = open_tracker(make_config(), run_dir, tags={})
    tracker.log(101, {"train/loss": 0.5})
    tracker.close("FINISHED")
    assert state_of(run_dir)["run_id"] == before["run_id"]
    rows = history(default_uri(run_dir), run_dir)
    assert rows == logged(run_dir)
    assert [step for step, _, _ in rows] == list(range(1, 102))
    assert client_of(default_uri(run_dir)).get_run(before["run_id"]).info.status == "FINISHED"


def test_resume_repeats_no_step_and_notes_changed_parameters(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = open_tracker(make_config(), run_dir, tags={"world_size": "2"})
    timed_log(first, range(1, 21))
    first.close("KILLED")
    client, run_id = client_of(default_uri(run_dir)), state_of(run_dir)["run_id"]
    assert client.get_run(run_id).info.status == "KILLED"
    longer = config_from_tree({"train": {"steps": 200}, "parallel": {"tensor": 2}}, "test")
    second = open_tracker(longer, run_dir, tags={"world_size": "4"})
    until(lambda: client.get_run(run_id).info.status == "RUNNING")
    # The checkpoint was of step 10; step 20 had no evaluation yet.
    timed_log(second, range(11, 31))
    second.log(20, {"train/loss": 99.0, "heldout/loss": 3.0})
    second.close("FINISHED")
    assert state_of(run_dir)["run_id"] == run_id
    rows = history(default_uri(run_dir), run_dir)
    assert [step for step, _, _ in rows] == list(range(1, 31))
    assert [value for _, _, value in rows] == [10.0 / step for step in range(1, 31)]
    assert [row[0] for row in history(default_uri(run_dir), run_dir, "heldout/loss")] == [20]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == "100"
    assert run.data.tags["config.changed"] == "train.steps: 100 -> 200"
    assert run.data.tags["attempt"] == "2"
    assert run.data.tags["parallel.tensor"] == "2"
    assert run.data.tags["world_size"] == "4"


def test_failed_run_is_recorded_as_failed(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    tracker = open_tracker(make_config(), run_dir, tags={})
    tracker.log(1, {"train/loss": 1.0})
    tracker.close("FAILED")
    tracker.close("FINISHED")  # a second close changes nothing
    run = client_of(default_uri(run_dir)).get_run(state_of(run_dir)["run_id"])
    assert run.info.status == "FAILED"
    assert run.info.end_time >= logged(run_dir)[0][1]


def test_two_runs_write_to_one_new_sqlite_file_at_once(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    command = [sys.executable, "-c", LOG_AND_CLOSE]
    children = [subprocess.Popen([*command, str(folder)], stderr=subprocess.PIPE) for folder in folders]
    for child in children:
        errors = child.communicate(timeout=120)[1].decode()
        assert child.returncode == 0
        assert len(errors.splitlines()) == 2 and "shows it" in errors and "all is sent" in errors
    for folder in folders:
        assert history(default_uri(folder), folder) == logged(folder)
        assert len(logged(folder)) == 300
    assert state_of(folders[0])["run_id"] != state_of(folders[1])["run_id"]


def test_run_deleted_in_mid_training_is_written_anew(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    tracker = open_tracker(make_config(), run_dir, tags={}, notify=print)
    timed_log(tracker, range(1, 6))
    until(lambda: state_of(run_dir)["sent_bytes"] > 0)
    deleted = state_of(run_dir)["run_id"]
    client_of(default_uri(run_dir)).delete_run(deleted)
    timed_log(tracker, range(6, 11))
    tracker.close("FINISHED")
    assert state_of(run_dir)["run_id"] != deleted
    assert history(default_uri(run_dir), run_dir) == logged(run_dir)
    assert len(logged(run_dir)) == 10


def test_another_uri_gets_the_whole_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for number, name in enumerate(("one.db", "two.db")):
        uri = f"sqlite:///{tmp_path}/{name}"
        artifact = run_dir / "notes.txt"
        tracker = open_tracker(make_config(uri), run_dir, tags={})
        artifact.write_text("notes")
        tracker.log_artifact(artifact)
        tracker.log(number, {"train/loss": 1.0})
        tracker.close("FINISHED")
        assert history(uri, run_dir) == logged(run_dir)
        found = client_of(uri).list_artifacts(state_of(run_dir)["run_id"])
        assert [file.path for file in found] == ["notes.txt"]
    assert len(logged(run_dir)) == 2


def test_switched_off_tracking_writes_only_into_the_run_folder(tmp_path: Path) -> None:
    tracker = open_tracker(make_config(enabled=False), tmp_path / "run", tags={})
    tracker.log(1, {"train/loss": 1.0})
    tracker.log_artifact(tmp_path)
    tracker.close("FINISHED")
    assert [point.metrics for point in read_points(tmp_path / "run" / "metrics.jsonl")] == [{"train/loss": 1.0}]
    assert sorted(os.listdir(tmp_path)) == ["run"]
    assert sorted(os.listdir(tmp_path / "run")) == ["metrics.jsonl", "mlflow_run.json", "tracking_state.json"]
