"""What a submission freezes besides what the user wrote."""

from __future__ import annotations

import os
import re
import shutil
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from helpers.submissions import Commands, made_for, submission
from typer.testing import CliRunner

import biroute.configs
from biroute.configs.cluster_profile import load_profile
from biroute.configs.errors import UsageError
from biroute.configs.load import load_config
from biroute.launcher.ranks.agreement import check_submission
from biroute.slurm import client
from biroute.slurm.commands import slurm_app
from biroute.slurm.submit import check_run_dir, freeze, limit_in_words, submit_run


def test_a_request_is_what_the_configuration_says(corpus: Path, tmp_path: Path) -> None:
    profile = {"time_limit": "24:00:00", "partition": "gpu", "python": "python3.12"}
    profile |= {"container": ["apptainer", "exec", "image.sif"]}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(profile))
    fields = {"nodes": 2, "ranks_per_node": 2, "time_limit": "2:00:00", "signal_seconds": 60, "requeue": False}
    found = submission(corpus, tmp_path, {"profile": str(tmp_path / "cluster.yaml")} | fields)
    assert {name: getattr(found.request, name) for name in fields} == fields
    assert found.profile.partition == "gpu"
    assert found.request.python == ("apptainer", "exec", "image.sif", "python3.12")
    assert found.layout.world_size == 4


@pytest.mark.parametrize(
    ("gpus", "overrides", "device"), [(2, [], "cuda"), (2, ["train.device=cpu"], "cpu"), (0, [], "auto")]
)
def test_a_cluster_with_gpus_trains_on_gpus(
    corpus: Path, tmp_path: Path, gpus: int, overrides: list[str], device: str
) -> None:
    """With train.device=auto a node whose GPU does not work would train on its CPU."""
    profile = tmp_path / "cluster.yaml"
    profile.write_text(yaml.safe_dump({"gpus_per_node": gpus}))
    slurm = {"profile": str(profile)}
    assert submission(corpus, tmp_path, slurm, overrides).config.train.device == device


def test_what_may_hold_a_token_is_for_its_owner_alone(corpus: Path, tmp_path: Path) -> None:
    profile = tmp_path / "cluster.yaml"
    profile.write_text(yaml.safe_dump({"environment": {"MLFLOW_TRACKING_TOKEN": "s3cret"}}))
    overrides = ["tracking.uri=http://me:s3cret@server:5000"]
    before = os.umask(0o022)
    try:
        (tmp_path / "submission").mkdir()
        freeze(submission(corpus, tmp_path, {"profile": str(profile)}, overrides), tmp_path / "submission")
    finally:
        os.umask(before)
    holding = [
        path for path in (tmp_path / "submission").iterdir() if path.is_file() and b"s3cret" in path.read_bytes()
    ]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in holding}
    assert modes == {"profile.yaml": 0o600, "config.yaml": 0o600, "job.sbatch": 0o700}


def test_a_run_folder_may_hold_checkpoints_to_start_from_and_nothing_else(tmp_path: Path) -> None:
    check_run_dir(tmp_path / "new" / "run")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    check_run_dir(tmp_path / "run")
    (tmp_path / "run" / "notes").touch()
    with pytest.raises(UsageError, match=r"run is not empty \(notes\); set train.run_dir to a new folder"):
        check_run_dir(tmp_path / "run")


@pytest.mark.parametrize(
    "place", ["/proc/x", "/sys/x/y", "/dev/null", "/dev/null/x", "/proc/self", "file/x", "x" * 300]
)
def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path: Path, place: str) -> None:
    """Also for root, to whom the system says that everything can be written."""
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    with pytest.raises((UsageError, OSError), match=r"cannot be written \(.*\); use a folder that can be|too long"):
        check_run_dir(tmp_path / place)
    assert sorted(tmp_path.iterdir()) == before


def test_a_colon_in_the_run_folder_is_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("{}")
    with pytest.raises(UsageError, match=r"2026-11-26T02:40: a colon would split PYTHONPATH"):
        submission(
            corpus, tmp_path, {"profile": str(tmp_path / "cluster.yaml")}, ["train.run_dir=runs/2026-11-26T02:40"]
        )


@pytest.mark.parametrize(
    ("field", "option", "remedy"),
    [
        ("sbatch_options", "--nodes=1", "is what slurm.nodes is for; set that"),
        ("sbatch_options", "--ntasks=1", "is set by BiRoute from the run; leave it out"),
        ("sbatch_options", "--time=1", "is what time_limit is for"),
        ("sbatch_options", "--wait", "is set by BiRoute"),
        ("srun_options", "--nodes=1", "is set by BiRoute"),
        ("srun_options", "--time=1", "is set by BiRoute"),
    ],
)
def test_options_that_would_change_what_was_asked_for_are_refused(
    corpus: Path, tmp_path: Path, field: str, option: str, remedy: str
) -> None:
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({field: [option]}))
    with pytest.raises(UsageError, match=rf"'{option}' {remedy}"):
        submission(corpus, tmp_path, {"profile": str(tmp_path / "cluster.yaml")})


def test_a_rank_of_a_submission_proves_code_and_number(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("{}")
    made = submission(corpus, tmp_path, {"profile": str(tmp_path / "cluster.yaml"), "ranks_per_node": 2})
    folder = made.request.run_dir / "submission"
    folder.mkdir(parents=True)
    freeze(made, folder)
    config = load_config(folder / "config.yaml")
    assert config.slurm.ranks_per_node == 2
    with pytest.raises(UsageError, match=r"this rank runs the code in .* and not what was submitted"):
        check_submission(folder / "config.yaml", config, 2)  # this test imports the checkout
    check_submission(tmp_path / "run.yaml", config, 7)  # no rank of the submission
    code = folder / "code" / "biroute"
    shutil.rmtree(code)
    code.symlink_to(Path(str(biroute.configs.__file__)).parents[1])
    check_submission(folder / "config.yaml", config, 2)
    with pytest.raises(UsageError, match=r"1 ranks were started, not slurm.nodes x slurm.ranks_per_node = 1 x 2"):
        check_submission(folder / "config.yaml", config, 1)


def test_variables_of_the_shell_do_not_override_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\nenv > {tmp_path}/got\necho 7\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("SBATCH_PARTITION", "SLURM_TIMELIMIT", "SLURM_LABELIO", "PYTHONPATH", "SLURM_CLUSTERS", "EDITOR"):
        monkeypatch.setenv(name, "x")
    assert client.submit(tmp_path / "job.sbatch") == "7"
    got = {line.partition("=")[0] for line in (tmp_path / "got").read_text().splitlines()}
    assert {"SLURM_CLUSTERS", "EDITOR"} <= got
    assert not got & {"SBATCH_PARTITION", "SLURM_TIMELIMIT", "SLURM_LABELIO", "PYTHONPATH"}
    assert "not passed on to the job: PYTHONPATH, SBATCH_PARTITION; the profile decides" in capsys.readouterr().err


UNCLEAR = "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1"


@pytest.mark.parametrize("unclear", [UNCLEAR, "sleep 30"], ids=["timed out", "no answer"])
def test_after_an_unclear_answer_the_job_is_looked_for(
    corpus: Path, tmp_path: Path, commands: Commands, unclear: str
) -> None:
    made = made_for(corpus, tmp_path)
    commands("sbatch", unclear)
    commands("squeue", "exit 1")
    with pytest.raises(client.UnclearError, match=r"whether the job is queued is not known, so .* is kept"):
        submit_run(made)
    assert made.request.script.exists(), "a job may need it"
    shutil.rmtree(made.request.run_dir)
    job = "\x1f".join(["17", "PENDING", "1:00", "Priority", "", "", "N/A", "(null)", str(made.request.script)])
    commands("squeue", f"[ ! -e {made.request.script} ] || printf '%s\\n' '{job}'")
    assert submit_run(made) == "17"
    assert made.request.script.exists()


@pytest.mark.parametrize(
    "answer",
    [
        "echo 'sbatch: Account balance 100 h'; echo 17",
        "printf 'Solde \\xe9puis\\xe9\\n' >&2; echo '17;main'",
    ],
)
def test_the_id_is_found_among_the_notices_of_a_site(
    corpus: Path, tmp_path: Path, commands: Commands, answer: str
) -> None:
    made = made_for(corpus, tmp_path)
    commands("sbatch", f'if [ "$1" = --test-only ]; then exit 0; fi; {answer}')
    assert submit_run(made) == "17"


@pytest.mark.parametrize("answer", ["exit 0", "kill -9 $$", "kill -2 $PPID; sleep 20"])
def test_what_is_no_clear_refusal_removes_nothing(
    corpus: Path, tmp_path: Path, commands: Commands, answer: str
) -> None:
    made = made_for(corpus, tmp_path)
    commands("sbatch", f'if [ "$1" = --test-only ]; then exit 0; fi; {answer}')
    commands("squeue", "exit 1")
    with pytest.raises(client.UnclearError, match="whether the job is queued is not known"):
        submit_run(made)
    assert made.request.script.exists()


def test_lines_of_another_form_in_slurms_answers_are_passed_over(commands: Commands) -> None:
    row = "\x1f".join(["17", "PENDING", "1:00", "Priority", "", "", "N/A", "(null)", "/x/job.sbatch"])
    commands("squeue", f"printf 'squeue: warning: \\xe9\\n\\n%s\\n' '{row}'")
    assert [job.job_id for job in client.queue()] == ["17"]
    past = "\x1f".join(["18", "", "0:0", "n1", "sbatch x"])
    commands("sacct", f"printf 'foo\\n%s\\n' '{past}'")
    assert [(job.job_id, job.state) for job in client.past_jobs(["18"])] == [("18", "")]


def test_a_refusal_is_told_whole_and_leaves_nothing(corpus: Path, tmp_path: Path, commands: Commands) -> None:
    made = made_for(corpus, tmp_path)
    commands("sbatch", "echo 'sbatch: error: invalid partition' >&2; echo 'sbatch: error: Batch failed' >&2; exit 1")
    with pytest.raises(UsageError, match="Slurm could not run the job: invalid partition; Batch failed") as caught:
        submit_run(made)
    assert not isinstance(caught.value, client.UnclearError)
    assert not made.request.run_dir.exists()


def test_of_two_submissions_at_once_one_wins_and_the_other_harms_nothing(
    corpus: Path, tmp_path: Path, commands: Commands
) -> None:
    made = made_for(corpus, tmp_path)
    commands("sbatch", "sleep 0.5; echo 5")

    def attempt(_: int) -> str:
        try:
            return submit_run(made)
        except UsageError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        answers = sorted(pool.map(attempt, range(4)))
    assert answers[0] == "5"
    assert all(re.search("is under way|holds a submitted run", answer) for answer in answers[1:])
    assert made.request.script.exists() and (made.request.script.parent / "code" / "biroute").is_dir()


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("24:00", "for at most 24 minutes"),
        ("24:00:00", "for at most 1 day"),
        ("90", "for at most 1 hour 30 minutes"),
        ("2-3:0:5", "for at most 2 days 3 hours 5 seconds"),
        ("infinite", "without a time limit"),
        ("0", "without a time limit"),
        ("00:00:00", "without a time limit"),
        (None, "with the partition's time limit"),
    ],
)
def test_a_limit_is_said_in_words(limit: str | None, words: str) -> None:
    assert limit_in_words(limit) == words


def test_forms_of_yaml_that_people_write_in_a_profile(tmp_path: Path) -> None:
    profile = tmp_path / "cluster.yaml"
    profile.write_text(
        "time_limit: infinite\nsetup: |\n  module load cuda\n  ulimit -l unlimited\n"
        "sbatch_options: --mail-type=FAIL\n"
    )
    found = load_profile(str(profile))
    assert found.setup == ("module load cuda", "ulimit -l unlimited")
    assert found.sbatch_options == ("--mail-type=FAIL",) and found.time_limit == "infinite"


@pytest.mark.parametrize(
    ("scontrol", "requeue", "told"),
    [
        ("echo 'JobId=17 JobState=PENDING Requeue=0 Restarts=0'", "true", True),
        ("echo 'JobId=17 JobState=PENDING Requeue=0 Restarts=0'", "false", False),  # nor does the user want it
        ("echo 'JobId=17 JobState=PENDING Requeue=1 Restarts=0'", "true", False),
        ("sleep 20", "true", False),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "true", False),
    ],
    ids=["refused", "not asked for", "allowed", "hangs", "fails"],
)
def test_a_site_that_refuses_to_queue_again_is_told(
    corpus: Path, tmp_path: Path, commands: Commands, scontrol: str, requeue: str, told: bool
) -> None:
    commands("sbatch", 'if [ "$1" = --test-only ]; then exit 0; fi; echo 17')
    commands("squeue", "")
    commands("scontrol", scontrol)
    made_for(corpus, tmp_path)  # writes the configuration
    words = ["submit", str(tmp_path / "run.yaml"), f"slurm.requeue={requeue}", f"train.run_dir={tmp_path}/new"]
    start = time.monotonic()
    done = CliRunner().invoke(slurm_app, words, catch_exceptions=False)
    assert time.monotonic() - start < 5 and done.exit_code == 0 and "job 17, run new" in done.output
    assert ("does not queue a job again (Requeue=0): at each stop BiRoute submits a new job" in done.output) == told
