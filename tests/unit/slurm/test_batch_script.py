"""The batch script run by bash, with programs in place of Slurm's commands that note what they get.

What Slurm really does is tested on a cluster (tests/system/slurm); here a command fails, or a job ends in a way,
that a cluster shows only now and then.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.job_request import request

from biroute.configs.cluster_profile import ClusterProfile
from biroute.launcher.attempts.journal import read_attempts
from biroute.slurm.run_folder import RunFolder
from biroute.slurm.script import render_job

PYTHON = """#!/bin/bash
echo "python $*" >> "$LOG"
case "$*" in
*slurm.job\\ begin*) if [ -n "$BEGIN" ]; then exit "$BEGIN"; fi; echo 1 ;;
*slurm.job\\ end*) if [ -n "$END_FAILS" ]; then exit 127; fi; echo "${DECISION:-requeue}" ;;
*slurm.preflight*) exit 0 ;;
*start.worker*) trap 'kill $!; exit 75' USR1; sleep "${TRAINING:-0}" & wait; exit "${STATUS:-75}" ;;
esac
"""
SRUN = '#!/bin/bash\nwhile [ "$1" != "$PYTHON" ]; do shift; done\nexec "$@"\n'
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$LOG"
case "$1" in
show) echo "JobId=7 JobState=$STATE Reason=${REASON:-None} Restarts=${RESTARTS:-0} StartTime=2026-11-27T17:00:00" \
    "EndTime=${END:-Unknown} PreemptTime=${PREEMPTED:-None}" \
    "Partition=main ExcNodeList=${EXCLUDED:-(null)}" ;;
requeue) left=$(cat "$FAILURES"); echo $((left - 1)) > "$FAILURES"
    if [ "$left" -gt 0 ]; then echo "Unable to contact slurm controller" >&2; exit 1; fi ;;
esac
"""
# srun, where Slurm kills a rank for its memory: the rank leaves a heartbeat, the job's output what Slurm said.
KILLED_FOR_MEMORY = """#!/bin/bash
while [ "$1" != "$PYTHON" ]; do shift; done
case "$*" in *start.worker*) ;; *) exec "$@" ;; esac
logs=$RUN_DIR/logs/attempt-0001
mkdir -p "$logs/ranks"
echo '{"rank": 0, "host": "n1", "pid": 1, "time": 1.0, "step": 7, "doing": "step 8"}' >"$logs/ranks/rank-00000.json"
echo "slurmstepd: error: Detected 1 oom_kill event in StepId=7.1. Some of the step tasks have been OOM Killed." >&2
echo "srun: error: n1: task 0: Out Of Memory" >&2
exit 137
"""
SBATCH = '#!/bin/bash\necho "sbatch $*" >> "$LOG"\necho 8\n'


class Batch:
    """The script in a folder of its own, and what its programs noted."""

    def __init__(
        self, folder: Path, profile: dict[str, Any] | None = None, failures: int = 0, **requested: Any
    ) -> None:
        self.run_dir, self.log = folder / "runs" / "run", folder / "log"
        (self.run_dir / "submission" / "code").mkdir(parents=True)
        (self.run_dir / "submission" / "config.yaml").touch()
        self.output = self.run_dir / "logs" / "slurm-7.out"
        programs = folder / "bin"
        programs.mkdir()
        for name, text in (("python", PYTHON), ("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH)):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        (folder / "failures").write_text(str(failures))
        python = str(programs / "python")
        given = request(
            run_dir=self.run_dir, working_dir=folder, python=(python,), host_python=python,
            profile=ClusterProfile(**profile or {}), **requested,
        )  # fmt: skip
        script = re.sub(r'(requeue|record|look)_pauses="[^"]*"', r'\1_pauses="0 0 0"', render_job(given))
        self.script = self.run_dir / "submission" / "job.sbatch"
        self.script.write_text(script)
        (folder / "spooled").write_text(script)  # Slurm's own copy
        self._spooled = str(folder / "spooled")
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}", "LOG": str(self.log), "FAILURES": str(folder / "failures"),
            "PYTHON": python, "STATE": "RUNNING", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_NODELIST": "n1",
        }  # fmt: skip

    def start(self, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", self._spooled], env=self.environment | environment, stdout=subprocess.PIPE, text=True
        )

    def run(self, **environment: str) -> tuple[int, str]:
        return self.end(self.start(**environment))

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Status of a script that was started, and what it said: into the run folder, if that is there."""
        output, _ = process.communicate(timeout=60)
        return process.returncode, output + (self.output.read_text() if self.output.exists() else "")

    def noted(self, beginning: str) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if line.startswith(beginning)]


def test_a_requeue_that_fails_is_tried_again(tmp_path: Path) -> None:
    batch = Batch(tmp_path, failures=2)
    status, output = batch.run()
    assert status == 75
    assert len(batch.noted("scontrol requeue 7")) == 3 and not batch.noted("sbatch")
    assert output.count("scontrol requeue failed (Unable to contact slurm controller); again in") == 2


def test_a_site_that_forbids_requeueing_gets_a_new_job(tmp_path: Path) -> None:
    batch = Batch(tmp_path, failures=100)
    _, output = batch.run()
    assert batch.noted("sbatch") == [f"sbatch --parsable --exclude= {batch.script}"]
    assert "submitted anew as job 8" in output


def test_a_permanent_refusal_is_not_waited_for_and_the_new_job_is_tried_again(tmp_path: Path) -> None:
    batch = Batch(tmp_path, failures=100)
    programs = tmp_path / "bin"
    (programs / "scontrol").write_text(SCONTROL.replace("Unable to contact slurm controller", "presently disabled"))
    (programs / "sbatch").write_text(
        '#!/bin/bash\necho "sbatch $*" >> "$LOG"\n'
        '[ "$(grep -c ^sbatch "$LOG")" -gt 2 ] && echo 8 && exit\necho timed out >&2; exit 1\n'
    )
    (programs / "squeue").write_text("#!/bin/bash\necho '7 x'\n")
    (programs / "squeue").chmod(0o755)
    _, output = batch.run()
    assert len(batch.noted("scontrol requeue")) == 1 and len(batch.noted("sbatch")) == 3
    assert "submitted anew as job 8" in output
    (batch.log).unlink()
    (programs / "squeue").write_text(f"#!/bin/bash\necho '9 {batch.script}'\n")  # it was queued all the same
    _, output = batch.run()
    assert len(batch.noted("sbatch")) == 1 and "submitted anew" in output


@pytest.mark.parametrize("decision", ["stop", "finished"])
def test_what_the_journal_does_not_want_is_not_queued_again(tmp_path: Path, decision: str) -> None:
    batch = Batch(tmp_path)
    batch.run(DECISION=decision)
    assert not batch.noted("scontrol requeue") and not batch.noted("sbatch")


def test_a_signal_during_the_set_up_is_remembered(tmp_path: Path) -> None:
    """The limit comes while `setup` still runs: the attempt is recorded and the job queued again."""
    batch = Batch(tmp_path, {"setup": [f"touch {tmp_path}/begun", "sleep 1.5"]})
    process = batch.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    status, output = batch.end(process)
    assert status == 75, output
    assert "USR1 received" in output
    (end,) = batch.noted("python -P -m biroute.slurm.job end")
    assert end.endswith("75 --signal=USR1")
    assert batch.noted("scontrol requeue 7")


def test_the_frozen_code_comes_first_whatever_the_profile_sets(tmp_path: Path) -> None:
    profile = {"environment": {"PYTHONPATH": "/other"}, "setup": ['export PYTHONPATH="/more:$PYTHONPATH"']}
    batch = Batch(tmp_path, profile)
    (tmp_path / "bin" / "python").write_text(PYTHON.replace('echo "python $*"', 'echo "path $PYTHONPATH"'))
    batch.run()
    assert set(batch.noted("path ")) == {f"path {batch.run_dir}/submission/code:/more:/other"}


BEFORE, SINCE = "2026-11-27T16:59:59", "2026-11-27T17:17:54"


# What Slurm 22.05 said while each of these ends was under way, on the cluster of tests/system/slurm.
@pytest.mark.parametrize(
    ("said", "noted", "again"),
    [
        ({"STATE": "RUNNING"}, "", True),
        ({"STATE": "COMPLETING", "REASON": "TimeLimit"}, "TERM (TIMEOUT)", True),
        ({"STATE": "COMPLETING", "PREEMPTED": SINCE}, "TERM (PREEMPTED)", True),
        ({"STATE": "RUNNING", "PREEMPTED": SINCE}, "TERM (PREEMPTED)", True),
        ({"STATE": "RUNNING", "PREEMPTED": BEFORE}, "", True),
        ({"STATE": "COMPLETING", "PREEMPTED": BEFORE}, "TERM (CANCELLED)", False),
        ({"STATE": "COMPLETING", "REASON": "NodeDown"}, "TERM (NODE_FAIL)", True),
        ({"STATE": "COMPLETING", "RESTARTS": "1"}, "TERM (REQUEUED)", True),
        ({"STATE": "COMPLETING", "RESTARTS": "1", "SLURM_RESTART_COUNT": "1"}, "TERM (CANCELLED)", False),
        ({"STATE": "COMPLETING"}, "TERM (CANCELLED)", False),
        ({"STATE": "CANCELLED"}, "TERM (CANCELLED)", False),
    ],
)
def test_how_slurm_ends_the_job_is_told_and_only_scancel_marks_it_cancelled(
    tmp_path: Path, said: dict[str, str], noted: str, again: bool
) -> None:
    batch = Batch(tmp_path)
    batch.run(**said)
    (end,) = batch.noted("python -P -m biroute.slurm.job end")
    assert end.endswith(f"75 --signal={noted}")
    assert (batch.run_dir / "submission" / "cancelled").exists() != again
    already = said.get("RESTARTS", "0") > said.get("SLURM_RESTART_COUNT", "0")
    assert bool(batch.noted("scontrol requeue")) != already, "twice would start it twice"


def training(batch: Batch, **environment: str) -> subprocess.Popen[str]:
    """Start the script and wait until its ranks train."""
    process = batch.start(TRAINING="30", **environment)
    deadline = time.monotonic() + 30
    while not batch.noted("python -P -m biroute.launcher.start.worker") and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)  # until its trap is set
    return process


@pytest.mark.parametrize(
    ("said", "first"),
    [
        ({"STATE": "COMPLETING", "REASON": "TimeLimit"}, True),
        ({"STATE": "COMPLETING", "PREEMPTED": SINCE}, True),
        ({"STATE": "RUNNING", "PREEMPTED": SINCE}, False),  # in its time of grace, which a requeue would end
        ({"STATE": "COMPLETING"}, False),
        ({"STATE": "COMPLETING", "REASON": "TimeLimit", "RESTARTS": "1"}, False),
    ],
)
def test_a_job_that_is_being_killed_is_queued_again_first(tmp_path: Path, said: dict[str, str], first: bool) -> None:
    """Slurm kills the script, too, KillWait seconds after its TERM; the ranks may need longer."""
    batch = Batch(tmp_path)
    process = training(batch, **said)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    notes = batch.noted("")
    end = next(number for number, note in enumerate(notes) if "slurm.job end" in note)
    assert ("scontrol requeue 7" in notes[:end]) == first
    if first:
        assert re.search(r"--signal=TERM \((TIMEOUT|PREEMPTED)\)$", notes[end])


def test_a_job_queued_again_too_early_is_taken_back(tmp_path: Path) -> None:
    batch = Batch(tmp_path)
    (tmp_path / "bin" / "scancel").write_text('#!/bin/bash\necho "scancel $*" >> "$LOG"\n')
    (tmp_path / "bin" / "scancel").chmod(0o755)
    batch.run(STATE="COMPLETING", RESTARTS="1", DECISION="stop")
    assert batch.noted("scancel") == ["scancel 7"] and not batch.noted("scontrol requeue")


def test_the_signal_before_the_limit_is_the_limit(tmp_path: Path) -> None:
    def noted(folder: Path, seconds: int) -> str:
        folder.mkdir()
        batch = Batch(folder)
        end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds))
        process = training(batch, END=end)
        process.send_signal(signal.SIGUSR1)
        process.communicate(timeout=60)
        return batch.noted("python -P -m biroute.slurm.job end")[0].partition("--signal=")[2]

    assert noted(tmp_path / "near", 100) == "USR1 (TIMEOUT)"
    assert noted(tmp_path / "far", 5000) == "USR1"


@pytest.mark.parametrize(("excluded", "wanted"), [("(null)", "n1"), ("n5,n6", "n5,n6,n1")])
def test_a_node_on_which_python_does_not_start_is_left(tmp_path: Path, excluded: str, wanted: str) -> None:
    batch = Batch(tmp_path)
    status, output = batch.run(BEGIN="127", EXCLUDED=excluded, SLURMD_NODENAME="n1")
    assert status == 1
    assert batch.noted("scontrol requeue 7") and batch.noted("scontrol update") == [
        f"scontrol update job 7 ExcNodeList={wanted}"
    ]
    left = (batch.run_dir / "submission" / "left-nodes").read_text()
    assert re.search(rf"job 7 left node n1, which cannot start {tmp_path}/bin/python$", left.strip())
    assert f"{wanted} excluded" in output and not batch.noted("python -P -m biroute.slurm.preflight")
    assert "which cannot start" in RunFolder(batch.run_dir).left_nodes()[0]


def test_a_node_that_does_not_see_the_run_folder_is_left(tmp_path: Path) -> None:
    """Its output and left-nodes would be in that folder, so the job's comment tells."""
    for name in ("empty", "missing"):  # the folder of runs
        (tmp_path / name).mkdir()
        batch = Batch(tmp_path / name, below_mount_point=name == "empty")
        shutil.rmtree(batch.run_dir)
        if name == "missing":
            batch.run_dir.parent.rmdir()
        status, output = batch.run(SLURMD_NODENAME="n1")
        assert status == 1 and f"node n1 does not see {batch.run_dir}" in output
        assert batch.noted("scontrol update") == [
            f"scontrol update job 7 Comment=BiRoute: node n1 does not see {batch.run_dir}",
            "scontrol update job 7 ExcNodeList=n1",
        ]
        assert batch.noted("scontrol requeue 7")


GONE = {
    "the run folder": lambda run: shutil.rmtree(run),
    "the run folder, moved": lambda run: run.rename(run.with_name("elsewhere")),
    "submission": lambda run: shutil.rmtree(run / "submission"),
    "submission/code": lambda run: shutil.rmtree(run / "submission" / "code"),
    "submission/config.yaml": lambda run: (run / "submission" / "config.yaml").unlink(),
}


@pytest.mark.parametrize("below_mount_point", [False, True])
@pytest.mark.parametrize("when", ["queued", "training"])
@pytest.mark.parametrize("what", GONE)
def test_what_was_deleted_is_no_fault_of_the_node(
    tmp_path: Path, what: str, when: str, below_mount_point: bool
) -> None:
    batch = Batch(tmp_path, below_mount_point=below_mount_point)
    if below_mount_point:
        (batch.run_dir.parent / "mlflow.db").touch()  # so it is mounted
    environment = {"SLURMD_NODENAME": "n1", "END_FAILS": "yes"}  # as the journal's Python, without code or folder
    if when == "queued":
        GONE[what](batch.run_dir)
        status, output = batch.run(**environment)
        assert not batch.noted("python") and status == 1
    else:
        process = training(batch, **environment)
        GONE[what](batch.run_dir)
        process.send_signal(signal.SIGTERM)
        status, output = batch.end(process)
        assert status == 1, output
    gone = batch.run_dir / (what if what.startswith("submission") else "")
    (told,) = batch.noted("scontrol update")
    assert (
        told == f"scontrol update job 7 Comment=BiRoute: ends, and is not queued again: {gone} was deleted or moved"
    )
    assert not batch.noted("scontrol requeue") and not batch.noted("sbatch")


def test_what_a_file_server_shows_late_is_waited_for(tmp_path: Path) -> None:
    batch = Batch(tmp_path)
    late = batch.run_dir.rename(tmp_path / "late")
    (batch.run_dir.parent / "mlflow.db").touch()
    (tmp_path / "bin" / "sleep").write_text(
        f'#!/bin/bash\nmv {late} {batch.run_dir} 2>/dev/null; exec /bin/sleep "$@"\n'
    )
    (tmp_path / "bin" / "sleep").chmod(0o755)
    status, _ = batch.run()
    assert status == 75 and not batch.noted("scontrol update job 7 Comment")


def test_without_its_script_a_job_is_not_submitted_anew(tmp_path: Path) -> None:
    batch = Batch(tmp_path, failures=100)
    batch.script.unlink()
    batch.run()
    assert not batch.noted("sbatch")
    (told,) = batch.noted("scontrol update")
    assert told.endswith(f"and {batch.script} was deleted or moved")


def test_an_end_that_cannot_be_recorded_does_not_end_the_run(tmp_path: Path) -> None:
    batch = Batch(tmp_path)
    _, output = batch.run(END_FAILS="yes", SLURMD_NODENAME="n1")
    assert len(batch.noted("python -P -m biroute.slurm.job end")) == 3
    assert batch.noted("scontrol requeue 7") and batch.noted("scontrol update") == [
        "scontrol update job 7 ExcNodeList=n1"
    ]
    assert "node n1 could not record the end of attempt 1" in output


@pytest.mark.parametrize("ended", [{"STATUS": "0"}, {"STATE": "CANCELLED"}])
def test_a_run_that_is_over_is_not_queued_again_for_that(tmp_path: Path, ended: dict[str, str]) -> None:
    batch = Batch(tmp_path)
    batch.run(END_FAILS="yes", **ended)
    assert not batch.noted("scontrol requeue") and not batch.noted("sbatch")


def test_not_every_node_is_tried(tmp_path: Path) -> None:
    batch = Batch(tmp_path)
    status, output = batch.run(BEGIN="1", EXCLUDED="n2,n3,n4", SLURMD_NODENAME="n1")
    assert status == 1 and not batch.noted("scontrol requeue")
    assert "n2,n3,n4,n1 are excluded, and slurm.max_restarts=3 allows no further node" in output


def test_a_rank_killed_for_its_memory_is_told(tmp_path: Path) -> None:
    """With the real journal, which finds the cause in the job's output."""
    batch = Batch(tmp_path)
    (tmp_path / "bin" / "srun").write_text(KILLED_FOR_MEMORY)
    real = f'#!/bin/bash\ncase "$*" in *slurm.job*) exec {sys.executable} "$@" ;; *) exit 0 ;; esac\n'
    (tmp_path / "bin" / "python").write_text(real)
    run = {"train": {"run_dir": str(batch.run_dir)}, "tracking": {"enabled": False}}
    (batch.run_dir / "submission" / "config.yaml").write_text(json.dumps(run))
    _, output = batch.run(RUN_DIR=str(batch.run_dir), SLURM_NTASKS="1")
    (attempt,) = read_attempts(batch.run_dir)
    assert attempt.cause == (
        "rank 0 on n1 ended without recording anything (last seen at step 7): memory ran out; give the job more "
        "(memory_per_node of the cluster profile, then `biroute resume RUN slurm.profile=PROFILE`), or lower "
        "train.microbatch_size, or set train.activation_checkpointing=true"
    ), output
    assert (attempt.status, attempt.decision) == (137, "requeue") and batch.noted("scontrol requeue 7")


def test_a_usage_error_at_the_begin_is_no_fault_of_the_node(tmp_path: Path) -> None:
    batch = Batch(tmp_path)
    status, _ = batch.run(BEGIN="2")
    assert status == 2 and not batch.noted("scontrol requeue")
