"""A copy of the code that a run was submitted with, so that later edits do not change a running run. No torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from biroute.configs.code_folders import PARTS, code_folder
from biroute.configs.files import write_atomically
from biroute.launcher.track.run_metadata import REVISION_NAME, git_tags

_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc")


def snapshot_code(folder: Path) -> None:
    """Copy every file of the installed packages to `folder`/biroute, from where a run imports it through PYTHONPATH.

    Raises:
        OSError: the copy cannot be written.
    """
    for part in PARTS:
        shutil.copytree(code_folder(part), folder / "biroute" / part, ignore=_LEFT_OUT)
    tags = git_tags(Path(__file__))
    write_atomically(folder / "biroute" / REVISION_NAME, json.dumps(tags, indent=1).encode() + b"\n")
