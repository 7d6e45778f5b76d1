from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.submissions import Commands

from biroute.slurm import client


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Put a shell script in the place of one of Slurm's commands."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr(client, "UNCLEAR_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(client, "SUBMIT_SECONDS", 2.0)
    monkeypatch.setattr(client, "LOOK_SECONDS", 0.5)

    def replace(name: str, text: str) -> None:
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)

    replace("sinfo", "echo 'main* 3'")
    return replace
