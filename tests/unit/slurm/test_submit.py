"""What a submission freezes besides what the user wrote."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.corpus import small_run

from biroute.configs.errors import UsageError
from biroute.slurm.submit import Submission, check_run_dir, freeze, prepare


def submission(corpus: Path, tmp_path: Path, slurm: dict[str, Any], overrides: list[str] | None = None) -> Submission:
    tree = small_run(corpus, tmp_path / "run", steps=2, parallel={}) | {"slurm": slurm}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return prepare(tmp_path / "run.yaml", overrides or [], tmp_path)


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
