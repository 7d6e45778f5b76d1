"""`biroute train` as a user runs it: real processes, a real MLflow store, real signals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.job import lines_of, until

from biroute.launcher.attempts.journal import read_attempts

from .conftest import Answer

Command = Callable[..., Answer]
METRICS = {
    "train/loss",
    "heldout/loss",
    "heldout/bits_per_byte",
    "heldout/perplexity",
    "optim/learning_rate",
    "optim/grad_norm",
    "throughput/tokens_per_second",
    "throughput/tokens_per_second_per_rank",
    "throughput/tflops_per_rank",
    "progress/tokens",
    "time/step_seconds",
    "memory/peak_gib",
    "progress/goodput",
    "throughput/slowest_rank",
    "throughput/slowest_rank_ratio",
    "time/comm_data_seconds",
    "train/loss_spike",
    "routing/entropy",
} | {f"time/{part}_seconds" for part in ("data", "forward", "backward", "exchange", "optimizer")}


def points(run_dir: Path) -> list[dict[str, Any]]:
    return lines_of(run_dir / "metrics.jsonl")


def training_steps(run_dir: Path) -> list[int]:
    return [point["step"] for point in points(run_dir) if "train/loss" in point["metrics"]]


def only_run(run_dir: Path) -> Any:
    """The one MLflow run in the store of `run_dir`, and the client that read it."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{run_dir.parent}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "biroute"]
    (run,) = client.search_runs([experiment.experiment_id])
    return run, client


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while step not in training_steps(run_dir):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"step {step} did not come"
        time.sleep(0.02)


def test_a_whole_run_and_what_mlflow_shows(config_file: Path, run_dir: Path, command: Command) -> None:
    answer = command("train", config_file, "parallel.data=2")
    assert answer.status == 0, answer.err
    assert "8 steps, on CPUs\n" in answer.out and "step 8/8" in answer.out
    assert "bits per byte" in answer.out
    assert answer.err == "", "nothing but our own lines"
    run, client = only_run(run_dir)
    assert run.info.status == "FINISHED"
    assert run.data.metrics.keys() >= METRICS
    assert run.data.params["model.attention.topk"] == "3"
    assert {"layout", "world_size", "host"} <= run.data.tags.keys()
    assert any("torch" in tag for tag in run.data.tags)
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in history] == list(range(1, 9))
    assert history[-1].value < history[0].value
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "tokenizer.model", "loss_curve.png"} <= artifacts

    other = command("train", config_file, "model.hidden_size=64", "train.steps=9")
    assert other.status == 2
    (line,) = other.err.splitlines()
    assert "checkpoint of another model" in line
    assert "model.hidden_size: 32 there, 64 here" in line

    shown = command("logs", run_dir)
    assert shown.status == 0 and "step 8/8" in shown.out, "of a run without Slurm as well"

    again = command("train", config_file, "parallel.data=2")
    assert again.status == 0
    assert "nothing to do" in again.out
    run_again, _ = only_run(run_dir)
    assert run_again.info.run_id == run.info.run_id
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 8


def test_files_that_lie_about_are_not_imported_and_odd_folders_are_no_urls(config_file: Path, tmp_path: Path) -> None:
    """Modules named like the library's where the command is run, and a temporary folder with a `#`.

    A folder's name that no font of the loss curve has, and no home, are no reason to print anything.
    """
    for name in ("random", "queue", "torch", "numpy", "biroute"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    odd = tmp_path / "odd #?% folder"
    odd.mkdir()
    command = [Path(sys.executable).with_name("biroute"), "train", config_file, f"train.run_dir={odd}/唐诗"]
    for steps in (2, 3):  # what the first start leaves must not disturb the second one
        answer = subprocess.run(
            [*command, "tracking.enabled=false", f"train.steps={steps}"],
            cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(odd), "HOME": "/nonexistent"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (answer.returncode, answer.stderr) == (0, "")
    assert training_steps(odd / "唐诗") == [1, 2, 3]
    assert not list((odd / "唐诗").glob("logs/*/*warnings*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])  # SIGUSR1 is what Slurm sends in its tests
def test_signal_saves_and_the_same_command_goes_on(
    number: signal.Signals, config_file: Path, run_dir: Path, start: Any, command: Command
) -> None:
    overrides = ["parallel.data=2", "train.steps=400", "checkpoint.every_steps=0", "train.evaluate_every=0"]
    process = start(*overrides)
    wait_for_step(run_dir, 3, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, (out, err)
    assert "the state is saved" in err
    stopped = training_steps(run_dir)[-1]
    assert 3 <= stopped < 400
    assert (run_dir / "checkpoints" / f"step-{stopped:08d}").is_dir()
    assert only_run(run_dir)[0].info.status == "KILLED"

    overrides[1] = f"train.steps={stopped + 2}"
    answer = command("train", config_file, *overrides)
    assert answer.status == 0, answer.err
    assert f"resumed after step {stopped}" in answer.out
    assert training_steps(run_dir) == list(range(1, stopped + 3))
    run, client = only_run(run_dir)
    assert run.info.status == "FINISHED"
    assert [p.step for p in client.get_metric_history(run.info.run_id, "train/loss")] == list(range(1, stopped + 3))
    causes = [f"{number.name}, stopped after step {stopped}", "the last step is done"]
    assert [attempt.cause for attempt in read_attempts(run_dir)] == causes
    for attempt, cause in enumerate(causes, start=1):
        assert run.data.tags[f"attempt.{attempt:04d}"] == f"{cause} ({socket.gethostname()})"


def test_ctrl_c_saves_and_an_edit_of_the_file_changes_no_running_attempt(
    config_file: Path, run_dir: Path, command: Command
) -> None:
    """Ctrl-C reaches the whole process group of the terminal: the launcher and rank 0."""
    overrides = ["parallel.data=2", "train.steps=400", "checkpoint.every_steps=0", "train.evaluate_every=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "biroute.launcher.cli.main", "train", str(config_file), *overrides],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    frozen = run_dir / "logs" / "attempt-0001" / "config.yaml"
    until(frozen.exists)
    text = config_file.read_text()
    config_file.write_text(text.replace("hidden_size: 32", "hidden_size: 64"))  # before the ranks have read anything
    try:
        wait_for_step(run_dir, 3, process)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, (out, err)
    assert "the state is saved: run the same command again" in err
    assert "Traceback" not in err
    config_file.write_text(text)
    stopped = training_steps(run_dir)[-1]
    answer = command("train", config_file, "parallel.data=2", f"train.steps={stopped + 1}")
    assert answer.status == 0, answer.err  # the same model: it never saw the other size
    assert f"resumed after step {stopped}" in answer.out


def test_a_dying_rank_ends_the_others_and_is_named(config_file: Path, run_dir: Path, start: Any) -> None:
    process = start("parallel.data=2", "train.steps=100000", "train.evaluate_every=0")
    wait_for_step(run_dir, 2, process)
    ranks = psutil.Process(process.pid).children()
    victim = next(rank for rank in ranks if rank.environ()["RANK"] == "1")
    victim.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rank 1 ended by SIGKILL" in err
    (attempt,) = read_attempts(run_dir)
    assert attempt.crash
    assert attempt.cause.startswith(f"rank 1 on {socket.gethostname()} ended without recording anything")
    run, _ = only_run(run_dir)
    assert run.info.status == "FAILED", "although no rank was left to say so"
    assert attempt.cause in run.data.tags["attempt.0001"]
    assert not [rank for rank in ranks if rank.is_running()], "no rank is left behind"


def test_an_unreachable_server_stops_nothing(config_file: Path, run_dir: Path, command: Command) -> None:
    answer = command(
        "train", config_file, "tracking.uri=http://me:s3cret@127.0.0.1:9", "tracking.flush_seconds=1", "train.steps=4"
    )
    assert answer.status == 0, answer.err
    assert "http://me:***@127.0.0.1:9" in answer.out
    assert "s3cret" not in answer.out + answer.err
    holding = [path for path in run_dir.rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()]
    assert {path.name for path in holding} == {"config.yaml"}
    assert not any(path.stat().st_mode & 0o077 for path in holding), "for its owner alone"
    assert "***" in (run_dir / "logs" / "attempt-0001" / "shown" / "config.yaml").read_text()
    assert training_steps(run_dir) == [1, 2, 3, 4]


def test_region_ranks_share_sequences(config_file: Path, run_dir: Path, command: Command) -> None:
    answer = command("train", config_file, "parallel.region=2", "parallel.zero_stage=1")
    assert answer.status == 0, answer.err
    assert "region=2" in answer.out
    run, client = only_run(run_dir)
    metrics = run.data.metrics
    assert 0 < metrics["exchange/forward_bytes"] <= metrics["exchange/causal_fetch_bytes"]
    assert metrics["exchange/causal_fetch_bytes"] < metrics["exchange/ring_bytes"]
    assert metrics["exchange/region_bytes"] <= metrics["exchange/region_bytes_worst"]
    assert metrics["exchange/layer_00_bytes"] > 0
    assert {metrics["exchange/worst_rank"], metrics["exchange/hottest_sender"]} <= {0, 1}
    assert metrics["exchange/hottest_sender_bytes"] > metrics["exchange/region_bytes"] / 2
    assert metrics["exchange/forward_bytes"] <= metrics["exchange/bound_bytes"]

    # The same run on unshared sequences: the same losses up to rounding, from the same checkpoint files.
    losses = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "train/loss")}
    whole = command("train", config_file, "parallel.data=2", f"train.run_dir={run_dir.parent / 'whole'}")
    assert whole.status == 0, whole.err
    for point in points(run_dir.parent / "whole"):
        if "train/loss" in point["metrics"]:
            assert point["metrics"]["train/loss"] == pytest.approx(losses[point["step"]], rel=1e-4)
