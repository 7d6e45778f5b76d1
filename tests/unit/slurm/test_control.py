"""A resume that changes something: what is written, what stays, what is refused; a script in the place of sbatch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from helpers.submissions import Commands, made_for

from biroute.configs.errors import UsageError
from biroute.slurm import client
from biroute.slurm.control import cancel_run, resume_run
from biroute.slurm.run_folder import RunFolder
from biroute.slurm.submit import submit_run


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
    before = {path: path.read_bytes() for path in (run.path / "submission").iterdir() if path.is_file()}
    with pytest.raises(UsageError, match=words):
        resume_run(run, overrides)
    assert {path: path.read_bytes() for path in (run.path / "submission").iterdir() if path.is_file()} == before
    assert not (run.path / "submission" / "earlier").exists()


def test_a_change_that_slurm_refuses_is_taken_back(run: RunFolder, commands: Commands) -> None:
    before = {path: path.read_bytes() for path in (run.path / "submission").iterdir() if path.is_file()}
    commands("sbatch", 'if [ "$1" = --test-only ]; then exit 0; fi; echo "error: no such account" >&2; exit 1')
    with pytest.raises(UsageError, match="no such account"):
        resume_run(run, ["slurm.nodes=2"])
    assert {path: path.read_bytes() for path in (run.path / "submission").iterdir() if path.is_file()} == before


def test_a_cancel_that_fails_is_tried_again_and_goes_on_with_the_other_jobs(
    run: RunFolder, commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "CANCEL_PAUSES", (0.0, 0.0, 0.0))
    rows = ["\x1f".join([job, state, "", "", "", "", "N/A", str(run.script)]) for job, state in JOBS]
    commands("squeue", "\n".join(f"printf '%s\\n' '{row}'" for row in rows))
    log = tmp_path / "scancel.log"
    commands("scancel", f'echo "$*" >> {log}; [ "$(wc -l < {log})" -gt 1 ]')  # fails once
    assert [line.split()[:2] for line in cancel_run(run, now=False)] == [["job", "5"], ["job", "6"]]
    commands("scancel", f'echo "$*" >> {log}; [ "${{!#}}" = 6 ] || {{ echo "Socket timed out" >&2; exit 1; }}')
    with pytest.raises(UsageError, match=r"job 6 cancelled; job 5: .*timed out; the run is marked as cancelled, so"):
        cancel_run(run, now=False)
    assert run.cancelled_mark.exists()


JOBS = (("5", "RUNNING"), ("6", "PENDING"))
