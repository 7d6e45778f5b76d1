"""What is installed is what the repository shows: a package that setuptools is not told of misses from a wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("configs", "model", "parallel", "data_pipeline", "launcher", "slurm")


@pytest.mark.slow
def test_the_wheel_holds_every_module(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy: setuptools would pack what an earlier build left in the tree
    source.mkdir()
    for name in (*PARTS, "pyproject.toml", "README.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", tmp_path, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("biroute-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"biroute/{path.relative_to(ROOT).as_posix()}"
        for part in PARTS
        for pattern in ("*.py", "*.yaml", "*.j2")
        for path in (ROOT / part).rglob(pattern)
    }
    assert wanted <= packed, sorted(wanted - packed)


def test_help_imports_no_torch() -> None:
    program = (
        "import sys; from biroute.launcher.cli import main; "
        "from biroute.launcher.start import train; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    "command", ["", "train", "data", "data build", "ui", "submit", "status", "logs", "cancel", "resume"]
)
def test_every_command_has_help(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "biroute.launcher.cli.main", *command.split(), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Usage:" in done.stdout
    if command not in ("", "data"):
        assert f"Example: biroute {command}" in done.stdout
