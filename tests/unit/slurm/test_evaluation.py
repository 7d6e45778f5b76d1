"""The job that evaluates beside a training: what it is asked for, how it ends, and that it endangers nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.job_request import request
from helpers.submissions import Commands, made_for
from typer.testing import CliRunner

from biroute.configs.cluster_profile import ClusterProfile
from biroute.configs.errors import UsageError
from biroute.slurm.commands import slurm_app
from biroute.slurm.control import cancel_run, resume_evaluation
from biroute.slurm.evaluation import EvaluationRequest, parse_arguments, render_evaluation, share_of_memory
from biroute.slurm.run_folder import RunFolder, find_run
from biroute.slurm.status import status_of
from biroute.slurm.status_text import format_status
from biroute.slurm.submit import submit_run, with_evaluation

SRUN = '#!/bin/bash\nwhile [ "$1" != "$PYTHON" ]; do shift; done\nexec "$@"\n'
PYTHON = """#!/bin/bash
echo "$*" >> "$LOG"
case "$*" in *--follow*) trap 'echo ended >> "$LOG"; exit 143' TERM
    for _ in $(seq "${FOLLOWS:-0}"); do sleep 0.05; done ;; esac
exit "${STATUS:-0}"
"""
SQUEUE = '#!/bin/bash\n[ -e "$GONE" ] || echo "$RUN/submission/job.sbatch"\n'
SCONTROL = '#!/bin/bash\necho "scontrol $*" >> "$LOG"\n'


class Job:
    """The script in a folder of its own, with programs that note what they get."""

    def __init__(self, folder: Path) -> None:
        self.run_dir, self.log, self.gone = folder / "run", folder / "log", folder / "gone"
        (self.run_dir / "submission").mkdir(parents=True)
        programs = folder / "bin"
        programs.mkdir()
        for name, text in (("python", PYTHON), ("srun", SRUN), ("squeue", SQUEUE), ("scontrol", SCONTROL)):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        python = str(programs / "python")
        training = request(run_dir=self.run_dir, working_dir=folder, python=(python,))
        script = render_evaluation(EvaluationRequest(training, ("--tasks", "loss,recall")), pause_seconds=0.01)
        self.script = self.run_dir / "submission" / "evaluate.sbatch"
        self.script.write_text(script)
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}", "LOG": str(self.log), "PYTHON": python,
            "RUN": str(self.run_dir), "GONE": str(self.gone), "SLURM_JOB_ID": "9",
        }  # fmt: skip

    def save(self) -> None:
        (self.run_dir / "checkpoints" / "step-00000002").mkdir(parents=True)
        (self.run_dir / "config.yaml").touch()

    def start(self, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(self.script)], env=self.environment | environment, stdout=subprocess.PIPE, text=True
        )

    def noted(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 20
        while not any(text in line for line in self.noted()):
            assert time.monotonic() < deadline, f"{text} did not come"
            time.sleep(0.02)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_it_waits_for_a_checkpoint_and_ends_with_the_evaluation(job: Job) -> None:
    process = job.start(STATUS="2")
    time.sleep(0.3)
    assert process.poll() is None and not job.noted()
    job.save()
    output, _ = process.communicate(timeout=20)
    command = (
        f"-P -m biroute.launcher.cli.main evaluate {job.run_dir} --every-checkpoint --tasks loss,recall --follow"
    )
    assert (process.returncode, job.noted()) == (2, [command]) and "ended with status 2" in output


def test_a_training_without_a_job_ends_it_after_what_it_left(job: Job) -> None:
    """Such as one that was cancelled while it was queued again: its journal says for ever that it goes on."""
    job.save()
    process = job.start(FOLLOWS="2000")
    job.wait_for("--follow")
    job.gone.touch()
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and "what it left is evaluated" in output
    assert job.noted()[1] == "ended" and job.noted()[2].endswith("--every-checkpoint --tasks loss,recall")


def test_a_training_that_left_nothing_ends_it(job: Job) -> None:
    job.gone.touch()
    process = job.start()
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and "left no checkpoint" in output and not job.noted()


@pytest.mark.parametrize("cancelled", [False, True])
def test_before_the_time_limit_it_is_queued_again(job: Job, cancelled: bool) -> None:
    job.save()
    if cancelled:
        (job.run_dir / "submission" / "cancelled").touch()
    process = job.start(FOLLOWS="2000")
    job.wait_for("--follow")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=20)
    assert process.returncode == 0 and "ended" in job.noted()
    assert ("scontrol requeue 9" in job.noted()) != cancelled


def test_it_asks_for_one_node_and_its_share() -> None:
    profile = ClusterProfile(
        account="us", partition="gpu", gpus_per_node=4, gpu_type="h200", cpus_per_rank=6, memory_per_node="500G",
        exclusive=True, srun_options=("--container-image=x", "--mpi=none"), sbatch_options=("--comment=a b",),
    )  # fmt: skip
    training = request(profile=profile, nodes=8, time_limit="1:00:00")
    script = render_evaluation(EvaluationRequest(training, ("--name", "it's"), "2:00:00"))
    for option in (
        "--job-name=one-evaluate", "--account=us", "--partition=gpu", "--nodes=1", "--ntasks-per-node=1",
        "--gpus-per-node=h200:1", "--cpus-per-task=6", "--mem=128000M", "--time=2:00:00", "--requeue",
    ):  # fmt: skip
        assert f"\n#SBATCH {option}\n" in script
    assert "exclusive" not in script and " --container-image=x" in script and "mpi" not in script
    assert "--name 'it'\"'\"'s'" in script and '#SBATCH "--comment=a b"' in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert (share_of_memory("0", 4), share_of_memory(None, 4), share_of_memory("1000", 3)) == (None, None, "334M")


def test_a_job_that_slurm_refuses_does_not_lose_the_training(
    corpus: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commands("sbatch", 'case "$*" in *evaluate*) echo "sbatch: error: no more jobs" >&2; exit 1;; *) echo 5;; esac')
    commands("squeue", "")
    made_for(corpus, tmp_path)
    done = CliRunner().invoke(slurm_app, ["submit", "run.yaml", "--evaluate", "--json"])
    assert done.exit_code == 0, done.output
    assert "warning: no job evaluates this run (sbatch refuses the job: no more jobs)" in done.stderr
    answer = json.loads(done.stdout)
    assert (answer["job_id"], answer["evaluation_job_id"]) == ("5", None)
    assert RunFolder(tmp_path / "run").job_ids() == ["5"]


def test_status_and_cancel_know_it_and_resume_submits_it_again(
    corpus: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commands("sbatch", 'echo "$*" >> asked; case "$*" in *evaluate*) echo 6;; *) echo 5;; esac')
    commands("squeue", "")
    commands("scancel", 'echo "$*" >> cancelled')
    submit_run(with_evaluation(made_for(corpus, tmp_path), ("--tasks", "loss"), None))
    run = RunFolder(tmp_path / "run")
    assert resume_evaluation(run, "5") == "6"
    assert (tmp_path / "asked").read_text().splitlines()[-1] == (
        f"--parsable --dependency=after:5 {run.path}/submission/evaluate.sbatch"
    )
    rows = [("5", "RUNNING", "job"), ("6", "RUNNING", "evaluate")]

    def queue(*shown: tuple[str, str, str]) -> None:
        lines = [
            "\x1f".join([number, state, "1:00", "None", "n1", "2026-11-30T10:00:00", "N/A", "(null)",
                         f"{run.path}/submission/{script}.sbatch"])
            for number, state, script in shown
        ]  # fmt: skip
        (tmp_path / "queue").write_text("".join(f"{line}\n" for line in lines))
        commands("squeue", f"cat {tmp_path}/queue")

    queue(*rows)
    assert resume_evaluation(run, "7") is None
    from biroute.slurm import client

    status = status_of(run, client.queue())
    assert [one.job_id for one in status.jobs] == ["5"] and [one.job_id for one in status.evaluations] == ["6"]
    assert "  evaluation job 6 RUNNING, on n1" in format_status(status)
    assert find_run(str(tmp_path / "run")).path == run.path
    assert cancel_run(run, now=False)[1] == "evaluation job 6 cancelled" and run.cancelled_mark.exists()
    assert (tmp_path / "cancelled").read_text().splitlines() == ["--batch --signal=USR1 5", "6"]
    run.cancelled_mark.unlink()
    queue(rows[1])  # the training has ended
    assert cancel_run(run, now=False) == ["evaluation job 6 cancelled"] and not run.cancelled_mark.exists()
    monkeypatch.setattr(client, "CANCEL_PAUSES", (0.0,))
    commands("scancel", "echo 'no such job' >&2; exit 1")
    with pytest.raises(UsageError, match=r"^evaluation job 6: .*no such job.*; run the same command again"):
        cancel_run(run, now=False)
    assert not run.cancelled_mark.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evaluate-options", "--limit 3"], r"--evaluate-options=--limit 3 is for --evaluate; give both"),
        (["--evaluate", "--evaluate-options", "--tasks lose"], "unknown task lose; did you mean loss"),
        (["--evaluate", "--evaluate-options", "--follow"], "--follow is set by the job"),
        (["--evaluate", "--evaluate-options", "'"], "quote it as for a shell"),
        (["--evaluate", "--evaluate-options", "--text a.txt"], "--text needs --name"),
        (["--evaluate", "--evaluate-time", "soon"], "--evaluate-time=soon is no time of Slurm's"),
    ],
)
def test_options_that_are_wrong_are_refused_before_anything(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    made_for(corpus, tmp_path)
    done: Any = CliRunner().invoke(slurm_app, ["submit", "run.yaml", *arguments])
    assert isinstance(done.exception, UsageError) and message in str(done.exception)
    assert not (tmp_path / "run").exists()


def test_arguments_are_words() -> None:
    assert parse_arguments("--tasks loss,lm_eval:x --name 'a b'") == ("--tasks", "loss,lm_eval:x", "--name", "a b")
    assert parse_arguments("--seed=3 --limit -1") == ("--seed=3", "--limit", "-1")  # evaluate itself refuses that
    for words, wrong in (("; rm -rf /", "';'"), ("--seed=3 4", "'4'"), ("--limit 3 4", "'4'")):
        with pytest.raises(UsageError, match=f"--evaluate-options: {wrong} is neither an option"):
            parse_arguments(words)
    assert replace(EvaluationRequest(request()), time_limit="1:00").script.name == "evaluate.sbatch"
