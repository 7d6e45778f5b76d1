from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from helpers.corpus import small_run


@dataclass(frozen=True)
class Answer:
    """What a command printed and how it ended."""

    status: int
    out: str
    err: str


def biroute(*arguments: object, **environment: str) -> Answer:
    """Run the command line as a user does."""
    done = subprocess.run(
        [sys.executable, "-m", "biroute.launcher.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )
    return Answer(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def command() -> Callable[..., Answer]:
    return biroute


@pytest.fixture(scope="session")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps with two tensor ranks, whose dataset is somewhere else now."""
    folder = tmp_path_factory.mktemp("trained")
    tree = small_run(corpus, folder / "run", steps=2, parallel={"tensor": 2, "data": 1})
    tree["tracking"] = {"enabled": False}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    done = biroute("train", folder / "run.yaml")
    assert done.status == 0, done.err
    config = (folder / "run" / "config.yaml").read_text()
    (folder / "run" / "config.yaml").write_text(config.replace(str(corpus), str(folder / "gone")))
    return folder / "run"


@pytest.fixture
def config_file(corpus: Path, tmp_path: Path) -> Path:
    """A small run on the corpus, in a folder of its own, with MLflow."""
    tree = small_run(corpus, tmp_path / "runs" / "small", steps=8, parallel={})
    del tree["tracking"]
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def run_dir(config_file: Path) -> Path:
    return config_file.parent / "runs" / "small"


@pytest.fixture
def start(config_file: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`start(*overrides)` starts `biroute train`; it and its ranks end with the test."""
    started: list[subprocess.Popen[str]] = []

    def start_training(*overrides: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "biroute.launcher.cli.main", "train", str(config_file), *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        return process

    yield start_training
    for process in started:
        for child in psutil.Process(process.pid).children() if process.poll() is None else []:
            child.kill()
        process.kill()
        process.communicate()
