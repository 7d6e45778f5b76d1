"""The plan of a submission: refused if it cannot fit, its time beside the limit, the steps that are left."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.submissions import Commands, submission
from typer.testing import CliRunner

from biroute.configs.cluster_profile import load_profile
from biroute.configs.errors import UsageError
from biroute.launcher.plan.hardware import GIB
from biroute.parallel.checkpoint.meta import CheckpointMeta, TrainingProgress
from biroute.slurm import forecast
from biroute.slurm.commands import slurm_app
from biroute.slurm.forecast import forecast_of_run
from biroute.slurm.run_folder import RunFolder
from biroute.slurm.submit import freeze, submit_run

HARDWARE = {
    "device": "slow one", "peak_tflops_bf16": 1e-3, "peak_tflops_fp32": 1e-3, "memory_gib": 1,
    "memory_gb_per_second": 1, "devices_per_node": 4, "intra_node_gb_per_second": 1, "inter_node_gb_per_second": 1,
    "efficiency": 0.5,
}  # fmt: skip


def cluster(folder: Path, **changes: Any) -> dict[str, Any]:
    """Section slurm of a run on a cluster whose profile names a hardware profile beside it."""
    (folder / "slow.yaml").write_text(yaml.safe_dump(HARDWARE | changes))
    (folder / "cluster.yaml").write_text(yaml.safe_dump({"hardware": "slow.yaml", "time_limit": "1:00:00"}))
    return {"profile": str(folder / "cluster.yaml"), "ranks_per_node": 2, "signal_seconds": 60}


def save_checkpoint(run_dir: Path, step: int, *, damaged: bool = False) -> None:
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    meta = CheckpointMeta(
        progress=TrainingProgress(step=step, sequences=0), about={"model": {}}, files={}, parameters={}
    )
    (folder / "meta.json").write_text("{" if damaged else meta.model_dump_json())


def test_a_run_that_cannot_fit_is_refused(corpus: Path, tmp_path: Path) -> None:
    slurm = cluster(tmp_path)
    fits = submission(corpus, tmp_path, slurm)
    assert fits.forecast is not None
    needed = fits.forecast.plan.memory.total / GIB
    cluster(tmp_path, memory_gib=0.9 * needed)
    with pytest.raises(UsageError, match=rf"the run does not fit: a rank needs {needed * 1024:.2f} MiB") as caught:
        submission(corpus, tmp_path, slurm)
    message = str(caught.value)
    assert f"{0.1 * needed * 1024:.2f} MiB too few" in message
    change = re.search(r"with (.+) it would fit", message)
    assert change is not None
    assert submission(corpus, tmp_path, slurm, change[1].split()).forecast is not None
    cluster(tmp_path, memory_gib=1e-6)
    with pytest.raises(UsageError, match="use a smaller model, or devices with more memory"):
        submission(corpus, tmp_path, slurm)


def test_without_the_field_nothing_is_predicted(corpus: Path, tmp_path: Path) -> None:
    slurm = cluster(tmp_path, memory_gib=1e-6)
    (tmp_path / "cluster.yaml").write_text("time_limit: 1:00:00")
    assert submission(corpus, tmp_path, slurm).forecast is None


def test_time_stands_beside_the_limit_and_the_steps_that_are_left(corpus: Path, tmp_path: Path) -> None:
    slurm = cluster(tmp_path)
    found = submission(corpus, tmp_path, slurm, ["train.steps=1000"]).forecast
    assert found is not None and found.remaining_steps == 1000 and found.time_limit_seconds == 3600
    # So slow that the run takes a little more than two jobs have without the time of their signals.
    factor = 2.01 * (3600 - 60) / found.remaining_seconds
    rates = [name for name in HARDWARE if "per_second" in name or "tflops" in name]
    cluster(tmp_path, **{name: HARDWARE[name] / factor for name in rates})  # type: ignore[operator]
    slow = submission(corpus, tmp_path, slurm, ["train.steps=1000"]).forecast
    assert slow is not None and slow.jobs == 3
    assert "the time limit is 60.0 minutes, so 3 starts (the job is queued again each time)" in slow.lines()[1]
    save_checkpoint(tmp_path / "run", 900)
    save_checkpoint(tmp_path / "run", 950, damaged=True)  # loading skips it, too
    last = forecast.make_forecast(slow.plan, "1:00:00")
    assert (last.done_steps, last.remaining_steps, last.jobs) == (900, 100, 1)
    assert last.lines()[1].startswith("steps left: 100 of 1,000, predicted to take")
    assert forecast.make_forecast(slow.plan, None).jobs is None


def test_a_dry_run_and_json_show_it(corpus: Path, tmp_path: Path, commands: Commands) -> None:
    made = submission(corpus, tmp_path, cluster(tmp_path))
    run = [str(tmp_path / "run.yaml"), "--dry-run"]
    text = CliRunner().invoke(slurm_app, ["submit", *run], catch_exceptions=False).output
    assert made.forecast is not None
    for line in made.forecast.lines():
        assert line in text
    answer = json.loads(CliRunner().invoke(slurm_app, ["submit", *run, "--json"], catch_exceptions=False).output)
    assert answer["predicted"] == made.forecast.as_values()
    assert answer["predicted"]["step_seconds"] == made.forecast.plan.step.total


def test_a_resume_shows_what_was_frozen(
    corpus: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commands("sbatch", "echo 5")
    for name in ("squeue", "sacct", "scontrol"):
        commands(name, "exit 0" if name == "squeue" else "exit 1")
    made = submission(corpus, tmp_path, cluster(tmp_path))
    submit_run(made)
    (tmp_path / "slow.yaml").unlink()
    save_checkpoint(made.request.run_dir, 1)
    (tmp_path / "run" / "checkpoints" / "step-00000001").rename(tmp_path / "aside")  # of no model that a resume takes
    answer = CliRunner().invoke(slurm_app, ["resume", str(made.request.run_dir)], catch_exceptions=False)
    assert answer.exit_code == 0 and "predicted on slow one" in answer.output
    shutil.move(tmp_path / "aside", tmp_path / "run" / "checkpoints" / "step-00000001")
    found = forecast_of_run(RunFolder(made.request.run_dir))
    assert found is not None and (found.remaining_steps, found.plan.layout.world_size) == (1, 2)
    assert found.time_limit_seconds == 3600


def test_a_frozen_profile_can_be_frozen_again(corpus: Path, tmp_path: Path) -> None:
    """A resume with changes writes the files over themselves."""
    made = submission(corpus, tmp_path, cluster(tmp_path))
    folder = made.request.run_dir / "submission"
    folder.mkdir(parents=True)
    freeze(made, folder)
    frozen = load_profile(str(folder / "profile.yaml"))
    assert frozen.hardware == str(folder / "hardware.yaml")
    assert yaml.safe_load(Path(frozen.hardware).read_text()) == HARDWARE


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"hardware": "h99"}, "hardware=h99: no such hardware profile; name a YAML file, from .* on, or one of a100"),
        ({"hardware": "empty.yaml"}, r"hardware of the cluster profile: .*empty.yaml: missing fields, add device"),
    ],
)
def test_a_bad_hardware_profile_is_named(corpus: Path, tmp_path: Path, content: dict[str, str], words: str) -> None:
    (tmp_path / "empty.yaml").write_text("{}")
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UsageError, match=words):
        submission(corpus, tmp_path, {"profile": str(tmp_path / "cluster.yaml")})
