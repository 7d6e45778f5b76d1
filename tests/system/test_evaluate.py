"""`biroute evaluate` on a run of two tensor ranks: training's own numbers, and each once in its MLflow run."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from helpers.corpus import small_run
from helpers.job import points_of, until
from helpers.ports import claim_port


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory, command: Callable[..., Any]) -> Path:
    """The folder of a run of four steps, with checkpoints and evaluations of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("evaluate")
    tree = small_run(corpus, folder / "run", steps=4, parallel={"tensor": 2, "data": 1})
    tree["train"]["evaluate_every"] = 2
    del tree["tracking"]
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    done = command("train", folder / "run.yaml")
    assert done.status == 0, done.err
    return folder / "run"


def in_mlflow(run: Path) -> list[tuple[int, float]]:
    """Every point of the loss that MLflow has, and that there is only one run."""
    with sqlite3.connect(run.parent / "mlflow.db") as database:
        assert database.execute("select count(*) from runs").fetchone() == (1,)
        return database.execute("select step, value from metrics where key = 'evaluate/heldout/loss'").fetchall()


def test_the_loss_is_that_of_training_and_comes_once(
    trained: Path, command: Callable[..., Any], tmp_path: Path
) -> None:
    done = command("evaluate", trained, "--every-checkpoint", "--follow", "--json", "--out", tmp_path / "out")
    assert done.status == 0, done.err
    found = json.loads(done.out)["evaluations"]
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == found
    for metric in ("loss", "perplexity", "bits_per_byte"):
        ours = [(one["step"], one["sections"][0]["measures"][metric]["value"]) for one in found]
        assert [step for step, _ in ours] == [2, 4]
        assert ours == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in points_of(trained, f"heldout/{metric}")
        ]
    sent = in_mlflow(trained)
    assert sorted(sent) == [(one["step"], one["sections"][0]["measures"]["loss"]["value"]) for one in found]
    again = command("evaluate", trained, "--every-checkpoint")
    assert again.status == 0 and again.err.count("has its results already") == 2 and not again.out
    once_more = command("evaluate", trained, "--checkpoint", 4)
    assert once_more.status == 0 and "loss_on_ar_hits" in once_more.out and "values sent" not in once_more.err
    assert in_mlflow(trained) == sent


def test_ctrl_c_ends_all_ranks_with_one_line(trained: Path) -> None:
    """The launcher starts them deaf, as ranks that train want it; a terminal sends it to rank 0 as well."""
    program = [sys.executable, "-m", "biroute.launcher.cli.main", "evaluate", str(trained), "--no-tracking"]
    with subprocess.Popen(
        [*program, "--ranks", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        until(lambda: len(psutil.Process(process.pid).children()) == 2)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.startswith("stopped") and err.count("\n") == 1


def test_several_ranks_find_the_same_and_say_it_once(
    trained: Path, command: Callable[..., Any], tmp_path: Path
) -> None:
    """Those that `--ranks` starts, and those of a Slurm step; a task of lm-eval beside our own."""
    (tmp_path / "data.jsonl").write_text('{"text": "Return the sum of all items."}\n{"text": "Close the file."}\n')
    (tmp_path / "rolling.yaml").write_text(
        f"task: rolling\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}\n"
        'test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list: [{metric: bits_per_byte}]\n"
    )
    wanted = ["evaluate", trained, "--tasks", "loss,recall,lm_eval:rolling", "--lm-eval-include", tmp_path, "--json"]
    local = command(*wanted, "--name", "two", "--ranks", 2)
    assert local.status == 0, local.err
    step = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(claim_port()), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    with ThreadPoolExecutor() as tasks:
        started = [
            tasks.submit(command, *wanted, "--no-tracking", SLURM_PROCID=str(n), SLURM_LOCALID=str(n), **step)
            for n in (0, 1)
        ]
        first, second = (one.result() for one in started)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert second.out == ""
    sections, named = (json.loads(one.out)["evaluations"][0]["sections"] for one in (first, local))
    assert [one["measures"] for one in sections] == [one["measures"] for one in named]
    ((_, loss),) = points_of(trained, "heldout/loss")[-1:]  # of training, by other ranks
    assert sections[0]["measures"]["loss"]["value"] == pytest.approx(loss, rel=1e-6)
    assert [one["name"] for one in named] == ["two", "two-recall", "two-lm_eval/rolling"]
    assert (sections[2]["name"], sections[2]["measures"]["documents"]["value"]) == ("lm_eval/rolling", 2)
    kept = [json.loads(line) for line in (trained / "evaluations.jsonl").read_text().splitlines()]
    assert sum("evaluate/two-lm_eval/rolling/bits_per_byte" in one["metrics"] for one in kept) == 1
