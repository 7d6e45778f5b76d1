"""Tracking against a real MLflow server that comes and goes: nothing blocks, is lost, or comes twice."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.tracked import (
    LOG_SECONDS,
    Server,
    client_of,
    history,
    logged,
    make_config,
    state_of,
    timed_log,
    troubles,
    until,
)

from biroute.configs.errors import UsageError
from biroute.launcher.track.mlflow_ui import check_port, serve_ui
from biroute.launcher.track.tracker import open_tracker


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.kill()


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
        # The second failure is told. On a busy machine the first may have been another than a timeout.
        waits = r"timed out after (\d) s \(tracking\.timeout_seconds=2; calls now wait up to (\d) s\)"
        waited = re.search(waits, troubles(said)[0])
        assert waited is not None, troubles(said)
        assert (int(waited[1]), int(waited[2])) in ((2, 4), (4, 8))
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


def test_the_end_of_a_job_leaves_most_of_its_time_to_saving(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server answered lately and freezes: a job that Slurm is about to end waits a quarter of its notice."""
    server.start()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    config = make_config(server.uri, flush_seconds=60.0)
    config = config.model_copy(update={"slurm": config.slurm.model_copy(update={"signal_seconds": 8})})
    run_dir = tmp_path / "run"
    tracker = open_tracker(config, run_dir, tags={}, notify=lambda _: None)
    timed_log(tracker, range(1, 6))
    until(lambda: state_of(run_dir)["sent_bytes"] > 0)
    server.signal(signal.SIGSTOP)
    try:
        timed_log(tracker, range(6, 11))
        start = time.monotonic()
        tracker.close("KILLED")
        assert 1.0 < time.monotonic() - start < 4.0
    finally:
        server.signal(signal.SIGCONT)


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
