"""A checkpoint file that does not fit: what reaches the caller is the disk, wherever the write broke off."""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from biroute.configs.errors import DISK_FULL
from biroute.parallel.checkpoint import save
from biroute.parallel.checkpoint.files import fingerprint
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


def test_every_piece_is_synced_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync of a whole file of many GB may take as long as a hang."""
    monkeypatch.setattr(save, "PIECE_BYTES", 1000)
    on_disk: list[int] = []
    content = {"large": torch.arange(1500.0), "small": torch.zeros(3)}
    written = write_file(tmp_path / "file", content, lambda: on_disk.append((tmp_path / "file").stat().st_size))
    assert on_disk == [1000 * (1 + at) for at in range(written.bytes // 1000)]
    assert fingerprint(tmp_path / "file") == written
    assert torch.equal(torch.load(tmp_path / "file", weights_only=True)["large"], content["large"])


def test_what_ends_a_rank_while_it_writes_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.save would complain about its archive, and the loss of another rank would look like an error of this."""
    monkeypatch.setattr(save, "PIECE_BYTES", 1000)

    def lost() -> None:
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(RuntimeError, match="closed by peer"):
        write_file(tmp_path / "file", {"weight": torch.zeros(1500)}, lost)


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Is a directory") as caught:
        write_file(tmp_path, {})
    assert caught.value.errno == errno.EISDIR
