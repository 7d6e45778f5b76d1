"""Settings of a run reach what they configure, seen from outside: files, metrics and MLflow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Answer
from .test_train import points

Command = Callable[..., Answer]


def history(run_dir: Path, metric: str) -> dict[int, float]:
    return {point["step"]: point["metrics"][metric] for point in points(run_dir) if metric in point["metrics"]}


def test_settings_of_a_run(config_file: Path, tmp_path: Path, command: Command) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/elsewhere.db"
    run_dir = tmp_path / "given"
    answer = command(
        "train", config_file, f"train.run_dir={run_dir}", "train.steps=6", "train.global_batch_size=2",
        "train.log_every=2", "train.evaluate_every=3", "train.evaluate_sequences=2", "checkpoint.every_steps=1",
        "checkpoint.keep=3", f"tracking.uri={uri}", "tracking.experiment=trials", "tracking.run_name=first",
        "optim.learning_rate=2e-3", "optim.min_learning_rate=2e-4", "optim.schedule=wsd", "optim.warmup_steps=2",
        "optim.decay_steps=1",
    )  # fmt: skip
    assert answer.status == 0, answer.err
    # The warm-up ends with step 2, the decay with step 6.
    assert history(run_dir, "optim/learning_rate") == pytest.approx({1: 1e-3, 2: 2e-3, 4: 2e-3, 6: 2e-4})
    assert sorted(history(run_dir, "heldout/loss")) == [3, 6]
    assert history(run_dir, "progress/tokens")[6] == 6 * 2 * 64
    kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith("step-"))
    assert kept == ["step-00000004", "step-00000005", "step-00000006"]
    client = MlflowClient(uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "trials"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "first"
    assert client.get_metric_history(run.info.run_id, "train/loss")[-1].step == 6


def test_a_start_that_takes_too_long_is_a_hang(config_file: Path, command: Command) -> None:
    """No rank gets through its imports in half a second."""
    answer = command("train", config_file, "train.startup_seconds=0.5", "train.hang_seconds=0.5")
    assert answer.status == 1
    assert "hang: " in answer.err
