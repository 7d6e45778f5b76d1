"""What is installed is what the repository shows: a package that setuptools is not told of misses from a wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from helpers.corpus import small_run

from biroute.configs.code_folders import PARTS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git knows: setuptools would pack what an earlier build left in the tree.

    In a source distribution, which git does not know, it is all but that.
    """
    folder = tmp_path_factory.mktemp("source")
    if not (ROOT / ".git").exists():
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"), dirs_exist_ok=True)
        return folder
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
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
        for pattern in ("*.py", "*.yaml", "*.j2", "*.html", "py.typed")
        for path in (ROOT / part).rglob(pattern)
    }
    assert wanted <= packed, sorted(wanted - packed)
    assert not [name for name in packed if "test" in name or name.endswith(".sh")]


@pytest.mark.slow
def test_the_metadata_is_complete(wheel: Path) -> None:
    packed = zipfile.ZipFile(wheel)
    (name,) = [name for name in packed.namelist() if name.endswith("dist-info/METADATA")]
    metadata = Parser().parsestr(packed.read(name).decode())
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["License-File"] == "LICENSE"
    assert metadata["Author"] == "The BiRoute developers"
    description = str(metadata.get_payload())
    assert description.startswith("# BiRoute") and not re.findall(r"\]\((?!https://)", description)
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert b"Apache License" in packed.read(name.replace("METADATA", "licenses/LICENSE"))
    assert all((f"biroute/{part}/py.typed") in packed.namelist() for part in PARTS)


@pytest.mark.slow
def test_the_source_distribution_can_be_tested(source: Path, tmp_path: Path) -> None:
    program = "import sys; from setuptools.build_meta import build_sdist; print(build_sdist(sys.argv[1]))"
    build = [sys.executable, "-c", program, str(tmp_path)]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (found,) = tmp_path.glob("biroute-*.tar.gz")
    with tarfile.open(found) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    for name in (
        "tests/run.py",
        "tests/helpers/pool.py",
        "Makefile",
        "README.md",
        "docs/architecture.md",
        "tests/system/slurm/dev_cluster.sh",
    ):
        assert name in packed, name
    assert "configs/constraints.txt" in packed and "LICENSE" in packed


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
