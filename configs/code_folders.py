"""The folders that BiRoute's code lies in."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

PARTS = ("configs", "data_pipeline", "launcher", "model", "parallel", "slurm")  # each is `biroute.<part>`


def code_folder(part: str) -> Path:
    """Return the folder of a part as it is imported here: of the repository, a wheel or the frozen code of a run."""
    return Path(str(import_module(f"biroute.{part}").__file__)).parent
