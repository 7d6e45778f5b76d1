"""Tracking against a real MLflow server and real SQLite files: nothing blocks, is lost, or comes twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.ports import claim_port

from biroute.configs.errors import UsageError
from biroute.configs.load import config_from_tree
from biroute.configs.schema import RunConfig
from biroute.launcher.track.metrics_log import read_points
from biroute.launcher.track.mlflow_ui import check_port, serve_ui
from biroute.launcher.track.tracker import open_tracker

LOG_SECONDS = 0.05  # what a log call may take, whatever the server does


def make_config(uri: str = "", **tracking: Any) -> RunConfig:
    section = {"uri": uri, "timeout_seconds": 20.0, "flush_seconds": 60.0, **tracking}
    return config_from_tree({"tracking": section, "train": {"steps": 100}}, "test")


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


def state_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "tracking_state.json").read_text())


def history(uri: str, run_dir: Path, name: str = "train/loss") -> list[tuple[int, int, float]]:
    """(step, time in ms, value) of each stored row, in order: a duplicated point shows."""
    rows = client_of(uri).get_metric_history(state_of(run_dir)["run_id"], name)
    return sorted((row.step, row.timestamp, row.value) for row in rows)


def logged(run_dir: Path, name: str = "train/loss") -> list[tuple[int, int, float]]:
    points = read_points(run_dir / "metrics.jsonl")
    return sorted((point.step, point.time_ms, point.metrics[name]) for point in points if name in point.metrics)


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait for `condition`; the limit is for a machine that is busy with other things."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.1)


def troubles(said: list[str]) -> list[str]:
    """What was said, without the lines that tell where the run is."""
    return [line for line in said if "of experiment" not in line and "all is sent" not in line]


def timed_log(tracker: Any, steps: range) -> float:
    """Log a loss for each step; seconds that nine of ten calls stay below.

    No call may take as long as a blocked one would (the time-out, 2 s at least). The strict bound leaves out one
    in ten: on a busy machine the scheduler may take the processor away in the middle of a call.
    """
    taken = []
    for step in steps:
        start = time.perf_counter()
        tracker.log(step, {"train/loss": 10.0 / step, "optim/learning_rate": 1e-3})
        taken.append(time.perf_counter() - start)
        time.sleep(0.01)
    assert max(taken) < 1.0
    return sorted(taken)[int(0.9 * len(taken))]


class Server:
    """An MLflow server that `serve_ui` started, on one port for the whole session."""

    def __init__(self, folder: Path) -> None:
        import sqlite3

        self.database = folder / "server.db"
        sqlite3.connect(self.database).close()  # serve_ui wants an existing file, an empty one will do
        self.port = claim_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.output = folder / "server.log"
        self._ui: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self._ui is not None:
            return
        call = f"serve_ui('sqlite:///{self.database}', {self.port})"
        code = f"from biroute.launcher.track.mlflow_ui import serve_ui; {call}"
        with self.output.open("wb") as output:
            self._ui = subprocess.Popen([sys.executable, "-c", code], stdout=output, stderr=subprocess.STDOUT)
        try:
            until(lambda: b"workflowType=machine_learning" in self.output.read_bytes(), 180)
        except AssertionError:
            self.kill()
            raise

    def processes(self) -> list[psutil.Process]:
        assert self._ui is not None
        return psutil.Process(self._ui.pid).children(recursive=True)

    def signal(self, number: int) -> None:
        for process in self.processes():
            process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to the server's processes; serve_ui itself sees that and ends."""
        if self._ui is not None:
            self.signal(signal.SIGKILL)
            self._ui.wait(30)
            self._ui = None

    def stop(self) -> list[psutil.Process]:
        """End serve_ui as Slurm or a user would; returns what is left of its processes."""
        assert self._ui is not None
        processes = self.processes()
        self._ui.terminate()
        self._ui.wait(30)
        self._ui = None
        return psutil.wait_procs(processes, timeout=5)[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.kill()


# ---- a server that comes and goes ----


def test_server_absent_at_the_start_gets_all_points_later(server: Server, tmp_path: Path) -> None:
    server.kill()
    said: list[str] = []
    run_dir = tmp_path / "run"
    tracker = open_tracker(make_config(server.uri), run_dir, tags={"world_size": "2"}, notify=said.append)
    assert timed_log(tracker, range(1, 31)) < LOG_SECONDS
    until(lambda: len(troubles(said)) == 1)
    assert "Connection refused" in said[0]
    assert "training continues, 60 values wait in" in said[0]
    server.start()
    until(lambda: len(troubles(said)) == 2)
    assert "reached again" in troubles(said)[1]
    tracker.close("FINISHED")
    assert history(server.uri, run_dir) == logged(run_dir)
    assert len(logged(run_dir)) == 30
    run = client_of(server.uri).get_run(state_of(run_dir)["run_id"])
    assert run.info.status == "FINISHED"
    assert run.info.start_time <= logged(run_dir)[0][1]
    assert run.data.params["model.attention.topk"] == "8"
    assert run.data.tags["world_size"] == "2"
    assert "parallel.tensor" not in run.data.tags  # at its default
    assert run.data.tags["version.torch"].startswith("2.")
    page = f"{server.uri}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}?workflowType=machine_learning"
    told = [line for line in said if page in line]
    assert len(told) == 2 and "run run of experiment biroute" in told[0] and "all is sent" in told[1]
    assert len(said) == 4


def test_server_killed_in_mid_training(server: Server, tmp_path: Path) -> None:
    server.start()
    said: list[str] = []
    run_dir = tmp_path / "run"
    tracker = open_tracker(make_config(server.uri), run_dir, tags={}, notify=said.append)
    timed_log(tracker, range(1, 11))
    until(lambda: state_of(run_dir)["sent_bytes"] > 0)
    server.kill()
    assert timed_log(tracker, range(11, 31)) < LOG_SECONDS
    until(lambda: len(troubles(said)) == 1)
    server.start()
    timed_log(tracker, range(31, 41))
    tracker.close("FINISHED")
    assert history(server.uri, run_dir) == logged(run_dir)
    assert len(logged(run_dir)) == 40


def test_server_frozen(server: Server, tmp_path: Path) -> None:
    server.start()
    said: list[str] = []
    run_dir = tmp_path / "run"
    tracker = open_tracker(
        make_config(server.uri, flush_seconds=1.0, timeout_seconds=2.0), run_dir, tags={}, notify=said.append
    )
    timed_log(tracker, range(1, 11))
    until(lambda: state_of(run_dir)["sent_bytes"] > 0)
    server.signal(signal.SIGSTOP)
    try:
        assert timed_log(tracker, range(11, 211)) < LOG_SECONDS
        until(lambda: len(troubles(said)) == 1)  # some requests timed out, and wait in the server's queue
        assert "timed out after 4 s (tracking.timeout_seconds=2; calls now wait up to 8 s)" in troubles(said)[0]
        start = time.monotonic()
        tracker.close("FAILED")
        assert time.monotonic() - start < 2.0  # flush_seconds, not the time-out of a call
        assert "values and the end of the run are not sent" in said[-1] and "biroute track sync" in said[-1]
    finally:
        server.signal(signal.SIGCONT)
    run_id = state_of(run_dir)["run_id"]
    # Thawed, the server also carries out what the client had given up on: still no point twice.
    second = open_tracker(make_config(server.uri), run_dir, tags={}, notify=print)
    second.close("FINISHED")
    assert state_of(run_dir)["run_id"] == run_id
    assert history(server.uri, run_dir) == logged(run_dir)
    assert len(logged(run_dir)) == 210


def test_artifacts_and_odd_metrics_over_http(server: Server, tmp_path: Path) -> None:
    server.start()
    said: list[str] = []
    run_dir = tmp_path / "run"
    tracker = open_tracker(make_config(server.uri), run_dir, tags={}, notify=said.append)
    picture, folder = run_dir / "picture.png", run_dir / "tokenizer"
    picture.write_bytes(b"first")
    folder.mkdir()
    (folder / "model.txt").write_text("pieces")
    tracker.log_artifact(picture)
    tracker.log_artifact(folder)
    tracker.log_artifact(run_dir / "never written")
    odd: dict[str, Any] = {"nan": float("nan"), "up": float("inf"), "a@b=c": 1.0, "损失": 2.0, "x" * 300: 1.0}
    tracker.log(1, odd | {"text": "no number"})
    tracker.log(2, odd | {"损失": 3.0, "up": float("-inf"), "a//b": 1.0})
    until(lambda: state_of(run_dir)["artifacts"].get("picture.png", "") != "")
    picture.write_bytes(b"second")
    tracker.close("FINISHED")
    client, run_id = client_of(server.uri), state_of(run_dir)["run_id"]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert Path(client.download_artifacts(run_id, "picture.png", str(tmp_path))).read_bytes() == b"second"
    assert Path(client.download_artifacts(run_id, "tokenizer/model.txt", str(tmp_path))).read_text() == "pieces"
    metrics = client.get_run(run_id).data.metrics
    assert [value for _, _, value in history(server.uri, run_dir, "损失")] == [2.0, 3.0]
    assert metrics["a_b_c"] == 1.0
    assert not {"up", "nan"} & set(metrics)
    assert [value for _, _, value in history(server.uri, run_dir, "train/nonfinite")] == [2.0, 2.0]
    assert client.get_run(run_id).data.tags["nonfinite"] == "nan nan at step 1; up inf at step 1"
    assert len([name for name in metrics if name.startswith("xxx")]) == 1
    assert len(troubles(said)) == 2, said  # and nothing about a lost server
    assert "metric 'text' of step 1 is left out" in troubles(said)[0]
    assert "refuses metric 'a//b'" in troubles(said)[1]


def models_of(uri: str, run_dir: Path) -> dict[str, Any]:
    """The logged models of a run by the step that they name; two of one step would be an error."""
    client, run_id = client_of(uri), state_of(run_dir)["run_id"]
    experiment = client.get_run(run_id).info.experiment_id
    found = [one for one in client.search_logged_models([experiment]) if one.source_run_id == run_id]
    assert len({one.params["step"] for one in found}) == len(found)
    return {one.params["step"]: one for one in found}


def test_each_checkpoint_is_one_model_also_after_a_resume(server: Server, tmp_path: Path) -> None:
    """The second attempt has lost its state file; meanwhile the first checkpoint was removed."""
    server.start()
    run_dir, said = tmp_path / "run", list[str]()
    folders = [run_dir / "checkpoints" / f"step-{step:08d}" for step in (10, 20)]
    for step, folder in zip((10, 20), folders, strict=True):
        tracker = open_tracker(make_config(server.uri), run_dir, tags={}, notify=said.append)
        tracker.log(step, {"train/loss": 3.0 - step / 100, "checkpoint/gib": 0.5})
        folder.mkdir(parents=True)
        if step == 20:
            folders[0].rmdir()
        tracker.log_checkpoint()
        tracker.log(step, {"heldout/bits_per_byte": 1.5})
        tracker.close("KILLED" if step == 10 else "FINISHED")
        first = models_of(server.uri, run_dir)["10"]
        assert first.tags["checkpoint.state"] == ("on disk" if step == 10 else "removed"), said
        if step == 10:
            (run_dir / "tracking_state.json").unlink()
    models = models_of(server.uri, run_dir)
    assert sorted(models) == ["10", "20"]
    second = models["20"]
    assert (second.name, second.params["path"]) == ("run-step-20", str(folders[1]))
    assert {one.key: (one.step, one.value) for one in second.metrics} == {
        "train/loss": (20, 2.8), "heldout/bits_per_byte": (20, 1.5), "checkpoint/gib": (20, 0.5),
    }  # fmt: skip
    outputs = client_of(server.uri).get_run(state_of(run_dir)["run_id"]).outputs.model_outputs
    assert sorted((one.model_id, one.step) for one in outputs) == sorted(
        (models[step].model_id, int(step)) for step in models
    )
    assert history(server.uri, run_dir) == logged(run_dir)  # linking a metric adds no second point
    assert troubles(said) == []


def test_serve_ui_ends_with_all_its_processes(server: Server) -> None:
    server.start()
    assert len(server.processes()) >= 1
    with pytest.raises(UsageError, match=f"port {server.port} is in use; choose another with --port"):
        serve_ui(f"sqlite:///{server.database}", server.port)
    assert server.stop() == []
    check_port("127.0.0.1", server.port)


# ---- a training process that comes and goes, SQLite ----

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
