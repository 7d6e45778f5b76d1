"""A dataset on a disk that cannot be written, as clusters mount shared ones."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.corpora import data_config

from biroute.configs.data_section import DataConfig
from biroute.configs.errors import UsageError
from biroute.data_pipeline.prepare.build import build_dataset
from biroute.data_pipeline.prepare.progress_bar import Progress
from biroute.data_pipeline.prepare.verify import check_dataset

QUIET = Progress(quiet=True)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[DataConfig]:
    """A complete dataset on a file system that has become read-only; skips where none can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "none", disk], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a read-only disk needs the right to mount a tmpfs: {done.stderr.strip()}")
    try:
        data = data_config(disk)
        build_dataset(data, QUIET)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        yield data
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_complete_dataset_needs_no_writing(read_only: DataConfig) -> None:
    assert build_dataset(read_only, QUIET).rebuilt == ()
    check_dataset(read_only.dir)
    with pytest.raises(UsageError, match=r"data\.dir=.*: cannot write .*Read-only file system.*a folder of your own"):
        build_dataset(read_only.model_copy(update={"tokens_per_sample": 500}), QUIET)
