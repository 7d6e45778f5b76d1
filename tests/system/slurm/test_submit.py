"""`biroute submit`, `status`, `cancel`, `resume` against a real Slurm; what a user does wrong, one line each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.slurm_cluster import Cluster, wait_for

from ..conftest import Answer
from ..test_cli_errors import assert_one_line

Command = Callable[..., Answer]
# Before or next to an option, in a name, at the end of a quoted word.
HOSTILE = """a "b\\c' $(touch pwned) `id` #x %j ; é"""


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text("partition: main\ntime_limit: 24:00:00\nnetwork_interface: eth0\n")
    return path


@pytest.fixture
def held(profile: Path) -> str:
    """Override for a profile whose jobs wait until somebody releases them."""
    profile.write_text(profile.read_text() + "sbatch_options: [--hold]\n")
    return f"slurm.profile={profile}"


@pytest.fixture
def on(cluster: Cluster, command: Command) -> Command:
    """The command line on the login node of the cluster."""

    def run(*arguments: object, **environment: str) -> Answer:
        return command(*arguments, SLURM_CONF=str(cluster.directory / "slurm.conf"), **environment)

    return run


def test_dry_run_needs_no_slurm_no_torch_and_writes_nothing(config_file: Path, profile: Path) -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'deepspeed', 'megatron', 'mlflow'): sys.modules[name] = None\n"
        "from biroute.launcher.cli.main import main\n"
        "main()"
    )
    before = sorted(config_file.parent.rglob("*"))
    overrides = [f"slurm.profile={profile}", "slurm.nodes=2", "parallel.data=4"]
    command = [sys.executable, "-c", program, "submit", str(config_file), *overrides, "--dry-run"]
    environment = {**os.environ, "PATH": "/nowhere"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert len(done.stdout.splitlines()) <= 10
    for words in ("2 nodes x 2 ranks", "in partition main, for at most 1 day", "nothing submitted; --verbose"):
        assert words in done.stdout
    command += ["--verbose"]
    verbose = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert "#SBATCH --time=24:00:00\n" in verbose
    assert "#SBATCH --ntasks-per-node=2\n" in verbose
    assert sorted(config_file.parent.rglob("*")) == before


def test_a_run_is_frozen_into_its_folder(config_file: Path, held: str, on: Command, cluster: Cluster) -> None:
    answer = on("submit", config_file, held, "slurm.nodes=2", "parallel.data=2", "--json")
    assert answer.status == 0, answer.err
    said = json.loads(answer.out)
    run_dir = Path(said["run_dir"])
    assert said["run_id"] == run_dir.name
    job = cluster.job(said["job_id"])
    assert (job["NumNodes"], job["NumTasks"], job["TimeLimit"]) == ("2-2", "2", "1-00:00:00")
    assert job["Command"] == str(run_dir / "submission" / "job.sbatch")

    frozen = yaml.safe_load((run_dir / "submission" / "config.yaml").read_text())
    assert Path(frozen["data"]["dir"]).is_absolute()
    assert frozen["train"]["run_dir"] == str(run_dir)
    code = run_dir / "submission" / "code"
    for part in ("configs", "launcher", "model", "parallel", "data_pipeline", "slurm"):
        module = f"biroute.{part}"
        show = f"import {module}, sys; print({module}.__file__)"
        out = subprocess.run(
            [sys.executable, "-c", show], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(code)}
        ).stdout
        assert out.startswith(str(code)), f"{module} is not the snapshot's"

    again = on("submit", config_file, held, "slurm.nodes=2", "parallel.data=2")
    assert_one_line(again, str(run_dir), "holds a submitted run", "biroute resume")


def test_values_survive_sbatch_unharmed(config_file: Path, profile: Path, on: Command, cluster: Cluster) -> None:
    profile.write_text(yaml.safe_dump({"sbatch_options": ["--hold", f"--comment={HOSTILE}"]}, allow_unicode=True))
    run_dir = config_file.parent / "runs" / HOSTILE.replace("\\", "").replace("/", "")
    answer = on(
        "submit", config_file, f"slurm.profile={profile}", "train.run_dir=" + json.dumps(str(run_dir)), "--json"
    )
    assert answer.status == 0, answer.err
    job_id = json.loads(answer.out)["job_id"]
    shown = cluster.client("squeue", "-h", "-j", job_id, "-o", "%j\x1f%k\x1f%o")
    assert shown.split("\x1f") == [run_dir.name, HOSTILE, str(run_dir / "submission" / "job.sbatch")]
    assert not list(config_file.parent.rglob("pwned"))


def test_whether_it_could_run(config_file: Path, profile: Path, on: Command, cluster: Cluster) -> None:
    with_profile = f"slurm.profile={profile}"
    answer = on("submit", config_file, with_profile, "slurm.nodes=2", "parallel.data=2", "--test")
    assert answer.status == 0, answer.err
    assert "node[1-2]" in answer.out
    assert cluster.client("squeue", "-h") == ""
    assert not (config_file.parent / "runs").exists()
    profile.write_text("memory_per_node: 999T\n")
    assert_one_line(on("submit", config_file, with_profile, "--test"), "Slurm could not run the job", "not available")


@pytest.mark.parametrize(
    ("settings", "overrides", "parts"),
    [
        ({"partition": "none"}, [], ["Slurm could not run the job", "partition"]),
        ({"constraint": "quantum"}, [], ["Slurm could not run the job", "feature"]),
        ({"memory_per_node": "999T"}, [], ["Slurm could not run the job"]),
        ({}, ["slurm.nodes=6", "parallel.data=null", "train.global_batch_size=12", "train.evaluate_sequences=12"],
         ["slurm.nodes=6", "partition main has 5 nodes"]),
    ],
)  # fmt: skip
def test_an_impossible_request_leaves_nothing(
    settings: dict[str, Any], overrides: list[str], parts: list[str], config_file: Path, profile: Path, on: Command
) -> None:
    profile.write_text(yaml.safe_dump(settings))
    assert_one_line(on("submit", config_file, f"slurm.profile={profile}", *overrides), *parts)
    assert not (config_file.parent / "runs" / "small").exists()


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["slurm.profile="], ["slurm.profile is empty", "cpu"]),
        (["slurm.profile=none"], ["slurm.profile=none", "no such cluster profile"]),
        (["slurm.nodes=3", "parallel.data=2"], ["slurm.nodes=3", "2 ranks"]),
        (["slurm.nodes=2", "slurm.ranks_per_node=3", "parallel.data=2"], ["2 x 3 = 6 ranks", "needs 2"]),
        (["slurm.nodes=2", "slurm.ranks_per_node=3", "parallel.tensor=4"], ["needs a multiple of 4"]),
        (["slurm.profile=gpu", "slurm.ranks_per_node=9"], ["slurm.ranks_per_node=9", "gpus_per_node=8"]),
        (["slurm.time_limit=1"], ["slurm.signal_seconds=120", "not below the time limit 1 (60 s)"]),
        (["slurm.time_limit=soon"], ["slurm.time_limit='soon'"]),
        (["slurm.nodes=0"], ["slurm.nodes=0"]),
        (["data.dir=/nowhere"], ["/nowhere", "biroute data build"]),
        (["train.steps=x"], ["train.steps='x'"]),
        (['train.run_dir="a\\nb"'], ["train.run_dir", "line break"]),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be(
    overrides: list[str], parts: list[str], config_file: Path, profile: Path, command: Command
) -> None:
    assert_one_line(command("submit", config_file, f"slurm.profile={profile}", *overrides, "--dry-run"), *parts)


def test_no_slurm_here(config_file: Path, profile: Path, command: Command, tmp_path: Path) -> None:
    for arguments in (("submit", config_file, f"slurm.profile={profile}"), ("cancel", "1"), ("logs", "1")):
        assert_one_line(command(*arguments, PATH=str(tmp_path)), "no such command", "login node")
    assert not (config_file.parent / "runs").exists()


def test_no_cluster(cluster: Cluster, config_file: Path, profile: Path, command: Command, tmp_path: Path) -> None:
    answer = command("submit", config_file, f"slurm.profile={profile}")
    assert_one_line(answer, "no Slurm cluster is configured here", "SLURM_CONF")
    nowhere = {"SLURM_CONF": str(tmp_path / "slurm.conf")}
    answer = command("submit", config_file, f"slurm.profile={profile}", **nowhere)
    assert_one_line(answer, "SLURM_CONF", "no such file")
    text = (cluster.directory / "slurm.conf").read_text()
    lines = ["SlurmctldPort=1" if line.startswith("SlurmctldPort=") else line for line in text.splitlines()]
    (tmp_path / "slurm.conf").write_text("\n".join(["MessageTimeout=2", *lines]))
    answer = command("submit", config_file, f"slurm.profile={profile}", **nowhere)
    assert_one_line(answer, "Slurm controller")  # it "does not answer", or, on a slow machine, not in time
    assert not (config_file.parent / "runs").exists()


def test_a_run_folder_in_use_or_full(config_file: Path, held: str, on: Command, tmp_path: Path) -> None:
    run_dir = config_file.parent / "runs" / "small"
    run_dir.mkdir(parents=True)
    (run_dir / "thesis.txt").write_text("years of work")
    assert_one_line(on("submit", config_file, held), "train.run_dir", "is not empty (thesis.txt)", "new folder")
    assert_one_line(on("submit", config_file, held, "--dry-run"), "train.run_dir", "is not empty (thesis.txt)")
    assert [path.name for path in run_dir.iterdir()] == ["thesis.txt"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(cluster: Cluster, config_file: Path, held: str, on: Command, small_disk: Path) -> None:
    answer = on("submit", config_file, held, f"train.run_dir={small_disk}/run")
    assert_one_line(answer, f"train.run_dir={small_disk}/run", "disk is full")
    assert list(small_disk.iterdir()) == [], "nothing is left"
    assert cluster.client("squeue", "-h") == ""


def test_a_job_that_is_not_ours(cluster: Cluster, on: Command, tmp_path: Path) -> None:
    foreign = cluster.client("sbatch", "--parsable", "--hold", "--wrap", "true")
    for verb in ("cancel", "status"):
        assert_one_line(on(verb, foreign), f"job {foreign} is not a BiRoute job")
    assert_one_line(on("resume", "999999"), "job 999999 is not known to Slurm")
    assert_one_line(on("logs", str(tmp_path)), "holds no run")
    assert cluster.job(foreign)["JobState"] == "PENDING", "cancel leaves it alone"


def test_cancel_and_resume_of_a_waiting_run(config_file: Path, held: str, on: Command, cluster: Cluster) -> None:
    first = json.loads(on("submit", config_file, held, "--json").out)
    run_dir = first["run_dir"]
    (status,) = json.loads(on("status", run_dir, "--json").out)
    assert (status["state"], status["steps"]) == ("queued", 8)
    assert status["reason"].startswith(f"held by its user: `scontrol release {first['job_id']}`")
    assert_one_line(on("resume", run_dir), f"has job {first['job_id']}, PENDING", "cancel")
    assert on("cancel", first["job_id"]).status == 0
    wait_for(lambda: not cluster.client("squeue", "-h"), 120, "the job to go")
    assert json.loads(on("status", run_dir, "--json").out)[0]["state"] == "cancelled"
    assert_one_line(on("cancel", run_dir), "no job queued or running", "cancelled")

    assert on("resume", run_dir).status == 0
    (status,) = json.loads(on("status", run_dir, "--json").out)
    assert status["state"] == "queued"
    (job,) = status["jobs"]
    assert job["job_id"] != first["job_id"]
    assert "small" in on("status").out, "without a name: all runs that have jobs"
