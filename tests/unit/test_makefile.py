"""`make` itself, in a small copy of the checkout: what it keeps, and what it does again."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# In the place of the installed command, as these tests are of what make calls and when.
BIROUTE = '#!/bin/sh\necho "$*" >> calls\n[ "$1 $2" != "data demo" ] || exec test -e reachable\n'


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile and an environment that it takes for complete."""
    for name in ("Makefile", "pyproject.toml", "configs/constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    program = tmp_path / ".venv" / "bin" / "biroute"
    program.parent.mkdir(parents=True)
    program.write_text(BIROUTE)
    program.chmod(0o755)
    (tmp_path / ".venv" / ".installed").touch()
    return tmp_path


def make(target: str, folder: Path) -> int:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # `make test`'s own
    return subprocess.run(["make", target], cwd=folder, env=clean, capture_output=True, check=False).returncode


def test_clean_keeps_data_and_runs(checkout: Path) -> None:
    kept = [
        "data/demo/text/english.jsonl.zst", "data/demo/dataset/manifest.json", "data/demo/text/.complete",
        "runs/demo/checkpoints/step-00000500/meta.json", "runs/mlflow.db", "runs/mlartifacts/1/model",
        "my.yaml", "configs/demo.yaml",
    ]  # fmt: skip
    left_over = [".venv-oldest/bin/python", ".venv-newest/x", ".types/biroute/x", "build/lib/x", "biroute.egg-info/x"]
    for name in (*kept, *left_over):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(name)
    assert make("clean", checkout) == 0
    assert [name for name in kept if not (checkout / name).is_file()] == []
    assert [name for name in (*left_over, ".venv") if (checkout / name).exists()] == []


def test_a_download_that_failed_is_tried_again_and_one_that_is_complete_is_not(checkout: Path) -> None:
    calls, complete = checkout / "calls", checkout / "data" / "demo" / "text" / ".complete"
    complete.parent.mkdir(parents=True)  # `biroute data demo` makes it
    for _ in range(2):
        assert make("train", checkout) == 2
        assert not complete.exists()
    assert calls.read_text().splitlines() == ["data demo data/demo/text"] * 2, "and nothing after it"
    (checkout / "reachable").touch()
    for _ in range(2):
        assert make("train", checkout) == 0
    then = ["data build configs/demo.yaml", "train configs/demo.yaml", "data bigram configs/demo.yaml"]
    assert calls.read_text().splitlines()[2:] == ["data demo data/demo/text", *then, *then]
