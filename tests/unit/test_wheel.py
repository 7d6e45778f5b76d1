"""What is installed is what the repository shows: a package that setuptools is not told of misses from a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from helpers.corpus import small_run

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("configs", "model", "parallel", "data_pipeline", "launcher", "slurm")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")  # a copy: setuptools would pack what an earlier build left in the tree
    for name in (*PARTS, "pyproject.toml", "README.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    built = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", built, source], check=True, capture_output=True)
    (found,) = built.glob("biroute-*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_no_test_tools(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"biroute/{path.relative_to(ROOT).as_posix()}"
        for part in PARTS
        for pattern in ("*.py", "*.yaml", "*.j2")
        for path in (ROOT / part).rglob(pattern)
    }
    assert wanted <= packed, sorted(wanted - packed)
    assert not [name for name in packed if "test" in name or name.endswith(".sh")]


@pytest.mark.slow
def test_the_installed_wheel_trains(wheel: Path, corpus: Path, tmp_path: Path) -> None:
    """Installed elsewhere and run far from the repository: `--help`, and a run of two steps."""
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    subprocess.run(install, check=True, capture_output=True)
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(small_run(corpus, tmp_path / "run", steps=2, parallel={"data": 1})))

    def run(*arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("-c", "import biroute.slurm.script as module; print(module.__file__)").startswith(str(site))
    assert "train" in run("-m", "biroute.launcher.cli.main", "--help")
    assert "step 2/2" in run("-m", "biroute.launcher.cli.main", "train", config)


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
