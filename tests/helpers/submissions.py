"""Runs that are ready to be submitted, for tests of what a submission does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from biroute.slurm.submit import Submission, prepare

from .corpus import small_run

Commands = Callable[[str, str], None]  # the fixture `commands`: name of one of Slurm's commands, shell script


def submission(corpus: Path, tmp_path: Path, slurm: dict[str, Any], overrides: list[str] | None = None) -> Submission:
    tree = small_run(corpus, tmp_path / "run", steps=2, parallel={}) | {"slurm": slurm}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return prepare(tmp_path / "run.yaml", overrides or [], tmp_path)


def made_for(corpus: Path, folder: Path) -> Submission:
    (folder / "cluster.yaml").write_text("{}")
    return submission(corpus, folder, {"profile": str(folder / "cluster.yaml")})
