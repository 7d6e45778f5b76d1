"""What is done with a run, also one whose folder was deleted or moved; scripts in the place of Slurm's commands."""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from helpers.submissions import Commands, made_for

from biroute.configs.errors import UsageError
from biroute.launcher.attempts.journal import begin_attempt
from biroute.slurm import client, control
from biroute.slurm.commands import status
from biroute.slurm.control import cancel_run, resume_run
from biroute.slurm.job import begin
from biroute.slurm.run_folder import RunFolder, find_run
from biroute.slurm.status import status_of
from biroute.slurm.submit import check_request, submit_run


@pytest.fixture
def run(corpus: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.chdir(tmp_path)
    commands("sbatch", "echo 5")
    commands("squeue", "")
    commands("sacct", "exit 1")
    commands("scontrol", "exit 1")
    made = made_for(corpus, tmp_path)
    submit_run(made)
    return RunFolder(made.request.run_dir)


def contents(run: RunFolder) -> dict[Path, bytes]:
    """What the submission holds, but for its lock."""
    files = (path for path in (run.path / "submission").iterdir() if path.is_file() and path.suffix != ".lock")
    return {path: path.read_bytes() for path in files}


def frozen(run: RunFolder) -> dict[str, dict[str, object]]:
    tree: dict[str, dict[str, object]] = yaml.safe_load((run.path / "submission" / "config.yaml").read_text())
    return tree


def test_a_resume_changes_what_it_is_asked_to_and_keeps_what_was(run: RunFolder, commands: Commands) -> None:
    # As if the run had been submitted with an older version, which knows no spike guard.
    path = run.path / "submission" / "config.yaml"
    tree = frozen(run)
    del tree["optim"]["spike_window"]
    path.write_text(yaml.safe_dump(tree))
    before = {name: (run.path / "submission" / name).read_text() for name in ("config.yaml", "job.sbatch")}
    commands("sbatch", "echo 6")
    overrides = ["optim.learning_rate=0.5", "slurm.nodes=2", "slurm.time_limit=2:00:00", "data.sources=[]"]
    assert resume_run(run, overrides, partition="long") == "6"
    now = frozen(run)
    assert now["optim"] == tree["optim"] | {"learning_rate": 0.5}
    assert (now["slurm"]["nodes"], now["slurm"]["time_limit"]) == (2, "2:00:00")
    assert now["train"] == tree["train"]
    script = run.script.read_text()
    for line in ("#SBATCH --nodes=2", "#SBATCH --time=2:00:00", "#SBATCH --partition=long"):
        assert f"{line}\n" in script and line not in before["job.sbatch"]
    earlier = run.path / "submission" / "earlier" / "0001"
    assert {name: (earlier / name).read_text() for name in before} == before
    last = json.loads((run.path / "submission" / "jobs.jsonl").read_text().splitlines()[-1])
    assert last["changes"] == [*overrides, "partition=long"] and last["by"] == "resume"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.run_dir=elsewhere"], "train.run_dir cannot change in a resume"),
        (["train={run_dir: elsewhere}"], "train is a section"),
        (["train.stepz=3"], "did you mean steps?"),
        (["slurm.nodes=2", "parallel.data=3"], "needs 3"),
        (["data.dir=nowhere"], "nowhere"),
    ],
)
def test_a_change_that_cannot_be_is_refused_and_changes_nothing(
    run: RunFolder, overrides: list[str], words: str
) -> None:
    before = contents(run)
    with pytest.raises(UsageError, match=words):
        resume_run(run, overrides)
    assert contents(run) == before
    assert not (run.path / "submission" / "earlier").exists()


def test_a_change_that_slurm_refuses_is_taken_back(run: RunFolder, commands: Commands) -> None:
    before = contents(run)
    commands("sbatch", 'if [ "$1" = --test-only ]; then exit 0; fi; echo "error: no such account" >&2; exit 1')
    with pytest.raises(UsageError, match="no such account"):
        resume_run(run, ["slurm.nodes=2"])
    assert contents(run) == before


def test_a_cancel_that_fails_is_tried_again_and_goes_on_with_the_other_jobs(
    run: RunFolder, commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "CANCEL_PAUSES", (0.0, 0.0, 0.0))
    rows = ["\x1f".join([job, state, "", "", "", "", "N/A", "(null)", str(run.script)]) for job, state in JOBS]
    commands("squeue", "\n".join(f"printf '%s\\n' '{row}'" for row in rows))
    log = tmp_path / "scancel.log"
    commands("scancel", f'echo "$*" >> {log}; [ "$(wc -l < {log})" -gt 1 ]')  # fails once
    assert [line.split()[:2] for line in cancel_run(run, now=False)] == [["job", "5"], ["job", "6"]]
    commands("scancel", f'echo "$*" >> {log}; [ "${{!#}}" = 6 ] || {{ echo "Socket timed out" >&2; exit 1; }}')
    with pytest.raises(UsageError, match=r"job 6 cancelled; job 5: .*timed out; the run is marked as cancelled, so"):
        cancel_run(run, now=False)
    assert run.cancelled_mark.exists()


JOBS = (("5", "RUNNING"), ("6", "PENDING"))


def test_of_two_resumes_at_once_one_submits(
    run: RunFolder, commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two jobs would take turns at the folder, each ending the other's attempt."""
    monkeypatch.setattr(control, "_LOCK_SECONDS", 0.2)
    row = "\x1f".join(["6", "PENDING", "", "None", "", "", "N/A", "(null)", str(run.script)])
    commands("sbatch", f"echo x >> {tmp_path}/submitted; sleep 0.5; echo 6")
    commands("squeue", f"[ ! -e {tmp_path}/submitted ] || printf '%s\\n' '{row}'")

    def attempt(_: int) -> str:
        try:
            return resume_run(run)
        except UsageError as error:
            return str(error)

    with ThreadPoolExecutor(3) as pool:
        answers = sorted(pool.map(attempt, range(3)))
    assert answers[0] == "6" and (tmp_path / "submitted").read_text() == "x\n"
    assert all(re.search("another `biroute resume` of it is under way|has job 6", answer) for answer in answers[1:])


def test_a_job_is_found_beside_a_run_that_cannot_be_read(run: RunFolder, commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "runs" / "a" / "submission" / "jobs.jsonl").mkdir(parents=True)
    run.path.rename(tmp_path / "runs" / "b")
    assert find_run("5").path == tmp_path / "runs" / "b"


def queue_of(commands: Commands, folder: Path, *jobs: tuple[str, str, Path]) -> None:
    """Let squeue and scontrol know jobs: number, state, batch script."""
    rows = ["\x1f".join([job, state, "", "None", "", "", "N/A", "(null)", str(path)]) for job, state, path in jobs]
    shown = [f"JobId={job} JobState={state} Reason=None Command={path} WorkDir={folder}" for job, state, path in jobs]
    commands("squeue", "\n".join(f"printf '%s\\n' '{row}'" for row in rows))
    cases = " ".join(f"*' {job}') echo '{text}';;" for (job, *_), text in zip(jobs, shown, strict=True))
    commands("scontrol", f'case " $*" in {cases} *) exit 1;; esac')


def test_the_folder_of_a_queued_job_was_deleted(
    run: RunFolder, commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queue_of(
        commands, tmp_path, ("5", "PENDING", run.script), ("6", "FAILED", run.script), ("7", "PENDING", Path("/x"))
    )
    shutil.rmtree(run.path)
    told = f"job 5, PENDING: its run folder {run.path} was deleted or moved; `scancel 5` ends the job"
    run.path.parent.joinpath("run.yaml").write_text(f"train: {{run_dir: {run.path}}}")
    for target in ("5", str(run.path), str(tmp_path / "run.yaml")):
        with pytest.raises(UsageError, match=f"^{re.escape(told)}"):
            find_run(target)
    with pytest.raises(UsageError, match=r"^job 6, FAILED: .* was deleted or moved, and the job has ended$"):
        find_run("6")
    with pytest.raises(UsageError, match="job 7 is not a BiRoute job"):
        find_run("7")
    status()
    assert told in capsys.readouterr().err, "all runs"
    run.path.mkdir()
    (run.path / "checkpoints").mkdir()
    with pytest.raises(UsageError, match=f"^{re.escape(told)}"):
        find_run(str(run.path))


@pytest.mark.parametrize("part", ["", "code", "config.yaml"])
def test_a_part_of_the_submission_of_a_queued_job_was_deleted(
    run: RunFolder, commands: Commands, tmp_path: Path, part: str
) -> None:
    (run.path / "metrics.jsonl").touch()  # it has trained before
    begin_attempt(run.path, nodes=["n1"], world_size=1, job="5")
    queue_of(commands, tmp_path, ("5", "PENDING", run.script))
    gone = run.path / "submission" / part
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    found = status_of(find_run("5"), client.queue())
    assert (found.state, found.reason) == (
        "queued", f"{gone} was deleted or moved: job 5 ends when it begins; `scancel 5` ends it now"
    )  # fmt: skip
    commands("scancel", f'echo "$*" >> {tmp_path}/ended')
    assert cancel_run(run, now=False) == ["job 5 cancelled"] and (tmp_path / "ended").read_text() == "5\n"
    commands("squeue", "")
    with pytest.raises(UsageError, match=f"^run run: {re.escape(str(gone))} was deleted or moved; bring it back, or"):
        resume_run(run)


def test_the_script_of_a_run_was_deleted(run: RunFolder) -> None:
    run.script.unlink()
    with pytest.raises(UsageError, match=r"job\.sbatch was deleted or moved; bring it back, or submit a run"):
        resume_run(run)


def test_the_folder_of_a_queued_job_was_moved(run: RunFolder, commands: Commands, tmp_path: Path) -> None:
    queue_of(commands, tmp_path, ("5", "PENDING", run.script))
    moved = RunFolder(run.path.rename(tmp_path / "other"))
    found = status_of(find_run(str(moved.path)), client.queue())
    assert (found.state, found.reason.partition(":")[0]) == ("queued", f"{run.path} was deleted or moved")
    commands("scancel", "")
    assert cancel_run(moved, now=False) == ["job 5 cancelled"]


def test_no_run_is_submitted_into_a_folder_that_an_older_job_waits_for(
    run: RunFolder, corpus: Path, commands: Commands, tmp_path: Path
) -> None:
    """The older job would train the new run, too: both would take turns at its folder."""
    queue_of(commands, tmp_path, ("5", "PENDING", run.script))
    shutil.rmtree(run.path)
    for act in (submit_run, lambda made: check_request(made.request)):
        with pytest.raises(UsageError, match=r"job 5, PENDING, belongs to a run that was there before .*`scancel 5`"):
            act(made_for(corpus, tmp_path))
    assert not run.path.exists()
    queue_of(commands, tmp_path, ("5", "PENDING", run.script.with_name("other") / "job.sbatch"))
    assert submit_run(made_for(corpus, tmp_path)) == "5"


def test_a_job_does_not_begin_in_the_folder_of_another_run(run: RunFolder, tmp_path: Path) -> None:
    begin(run.path)
    moved = run.path.rename(tmp_path / "other")
    with pytest.raises(
        UsageError, match=rf"{moved} holds a run that was submitted as {run.path}, and this job is of"
    ):
        begin(moved)
    run.path.symlink_to(moved)
    assert begin(run.path) == begin(moved) - 1 == 2
