"""Runs compared: what is read from MLflow, what is computed of it, and a page that needs nothing else."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from typer.testing import CliRunner

from biroute.configs.errors import UsageError
from biroute.launcher.report.command import report_app
from biroute.launcher.report.compare import METRICS, ComparedRun, differing
from biroute.launcher.track.mlflow_history import read_histories

HOSTILE = "<script>alert('x')</script>|`$x$"


class Store:
    """An MLflow database with runs of ten steps, logged at steps 1, 5 and 10."""

    def __init__(self, database: Path) -> None:
        self.uri = f"sqlite:///{database}"
        self.client = MlflowClient(self.uri)
        self.experiment = self.client.create_experiment("biroute", str(database.parent / "artifacts"))

    def run(self, name: str, *, speed: float = 1.0, tags: dict[str, str] | None = None, **params: str) -> str:
        run_id: str = self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id
        metrics = []
        for step, seconds in ((1, 5.0), (5, 2.0), (10, 1.0)):
            rate = speed * 100 / seconds
            values = {
                "train/loss": 4.0 - step / 10, "progress/tokens": 100.0 * step, "time/step_seconds": seconds / speed,
                "throughput/tokens_per_second": rate, "throughput/tokens_per_second_per_rank": rate / 2,
                "throughput/tflops_per_rank": rate / 2 * 3e9 / 1e12, "memory/peak_gib": 2.0,
                "exchange/region_bytes": 1048576.0 * step, "exchange/forward_bytes": 30.0,
                "exchange/bound_bytes": 60.0,
            }  # fmt: skip
            metrics += [Metric(key, value, 1_000_000 + 60_000 * step, step) for key, value in values.items()]
        # Sent again by a later attempt, whose step took another time.
        metrics.append(Metric("time/step_seconds", 77.0, 9_000_000, 10))
        metrics.append(Metric("heldout/loss", 3.5, 1_700_000, 10))
        self.client.log_batch(run_id, metrics=metrics, params=[Param(key, value) for key, value in params.items()])
        self.client.set_terminated(run_id, "FINISHED")
        return run_id


@pytest.fixture
def store(mlflow_database: Path, tmp_path: Path) -> Store:
    return Store(Path(shutil.copy(mlflow_database, tmp_path / "mlflow.db")))


def report(*words: Any) -> str:
    done = CliRunner().invoke(report_app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_curves_go_over_tokens_time_and_operations(store: Store) -> None:
    (history,) = read_histories([store.run("one")], store.uri, METRICS)
    run = ComparedRun(history)
    curve = run.curve("train/loss")
    assert curve.tokens == [100.0, 500.0, 1000.0]
    assert curve.values == [3.9, 3.5, 3.0]
    # A point has the mean of the steps since the one before; of a step that was repeated the first counts.
    assert curve.seconds == [5.0, 5.0 + 4 * 2.0, 5.0 + 4 * 2.0 + 5 * 1.0]
    assert curve.flops == pytest.approx([3e11, 1.5e12, 3e12])
    assert run.curve("heldout/loss").tokens == [1000.0]
    assert run.middle("throughput/tokens_per_second") == 75.0  # without the first point
    assert run.predicted("step_seconds") is None


def test_a_page_has_every_number_and_needs_no_other_file(store: Store, tmp_path: Path) -> None:
    plan = {"plan.step_seconds": "0.75", "plan.tokens_per_second": "130", "plan.peak_gib": "1.5", "plan.device": "H"}
    first = store.run("first", tags={"layout": "data=2", **plan}, **{"model.num_layers": "2", "train.steps": "10"})
    second = store.run(HOSTILE, speed=2, tags={"layout": "data=2"}, **{"model.num_layers": "4", "train.steps": "10"})
    out = tmp_path / "new" / "out"
    said = report(first, second, first, "--uri", store.uri, "--out", out)
    assert "report.html" in said and "report.md" in said
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    for content in (page, text):
        for words in ("first", "1.00k", "3.5000", "H", "2.00", "50%", "7.5 MiB"):
            assert words in content, words
        assert "<script" not in content
    # step: predicted 0.75 s, measured 1.5 s (median of 2.0 and 1.0); received: the median of 5 and 10 MiB is 7.5 MiB
    assert re.search(r"\| first \| H \| 0\.75 s \| 1\.5 s \| 2\.00 \| 1\.5 GiB \| 2 GiB \|", text)
    assert re.search(r"\| model\.num_layers \| 2 \| 4 \|", text) and "train.steps" not in text
    sources = re.findall(r'(?:src|href)="(.{0,22})', page)
    assert sources == ["data:image/png;base64,"] * 2
    assert not re.search(r"https?:|@import|url\(", page)
    assert len(re.findall(r"^\| first \|", text, re.MULTILINE)) == 4  # named twice, there once in each table
    assert (out / "report-loss.png").exists() and "](report-loss.png)" in text


def test_runs_of_one_name_are_told_apart(store: Store, tmp_path: Path) -> None:
    ids = [store.run("same"), store.run("same")]
    report(*ids, "--uri", store.uri, "--out", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert all(f"same ({run_id[:6]})" in text for run_id in ids)


def test_a_run_folder_is_only_an_address(store: Store, tmp_path: Path) -> None:
    """All else comes from MLflow: the folder has no metrics."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(f"tracking: {{uri: '{store.uri}'}}\n")
    state = {"target": "", "run_key": "0" * 32, "run_id": store.run("one")}
    (folder / "tracking_state.json").write_text(json.dumps(state))
    (history,) = read_histories([str(folder)], None, METRICS)
    assert history.name == "one" and list(history.steps) == [1, 5, 10]


def test_a_run_that_has_only_begun_has_a_page(store: Store, tmp_path: Path) -> None:
    run_id = store.client.create_run(store.experiment, run_name="new 春\x1b").info.run_id
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # matplotlib's, of a font that lacks a character
        report(run_id, "--uri", store.uri, "--out", tmp_path / "out")
    assert "| new 春\\\\x1b | - | RUNNING | - | - | - | - | - |" in (tmp_path / "out" / "report.md").read_text()


def test_settings_that_differ(store: Store) -> None:
    ids = [store.run("a", same="1", other="1"), store.run("b", same="1", new="2", tags={"layout": "data=2"})]
    runs = [ComparedRun(one) for one in read_histories(ids, store.uri, METRICS)]
    assert differing(runs) == [("layout", ["", "data=2"]), ("new", ["", "2"]), ("other", ["1", ""])]


def test_a_run_that_mlflow_does_not_have_is_one_line(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    deleted = store.run("gone")
    store.client.delete_run(deleted)
    (tmp_path / "empty").mkdir()
    nobody = "0" * 32
    missing = f"sqlite:///{tmp_path / 'missing.db'}"
    for words, message in (
        ([nobody, "--uri", store.uri], rf"{nobody}: MLflow \(sqlite:.*\) has no run {nobody}"),
        ([deleted, "--uri", store.uri], "is deleted in MLflow"),
        ([nobody, "--uri", missing], "no such file"),
        ([nobody], "name its store with --uri"),
        (["runs/x"], "neither a run folder nor the id of a run"),
        ([tmp_path / "empty"], "MLflow has no run of this folder; `biroute track sync"),
        ([nobody, "--uri", "ftp://x"], "unsupported scheme"),
    ):
        with pytest.raises(UsageError, match=message):
            report(*words, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "missing.db").exists()
