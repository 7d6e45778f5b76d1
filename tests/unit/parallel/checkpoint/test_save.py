"""A checkpoint file that does not fit: what reaches the caller is the disk, wherever the write broke off."""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from biroute.configs.errors import DISK_FULL
from biroute.parallel.checkpoint.save import write_file


@pytest.fixture
def limit_file_size() -> Iterator[Callable[[int], None]]:
    """Makes writes beyond so many bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_cause_is_the_disk_at_every_size(limit_file_size: Callable[[int], None], tmp_path: Path) -> None:
    content = {f"weight{at}": torch.zeros(997 + 13 * at) for at in range(12)}
    write_file(tmp_path / "whole", content)
    whole = (tmp_path / "whole").stat().st_size
    for size in range(0, whole, 509):  # in a tensor's bytes, between two, in the archive's index
        limit_file_size(size)
        with pytest.raises(OSError, match=r".") as caught:
            write_file(tmp_path / "part", content)
        assert caught.value.errno in DISK_FULL, f"at {size} of {whole} bytes: {caught.value!r}"


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Is a directory") as caught:
        write_file(tmp_path, {})
    assert caught.value.errno == errno.EISDIR
