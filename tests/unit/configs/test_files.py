"""The one door to files that are written: never through a planted link, never emptying what is there."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from biroute.configs.errors import UsageError
from biroute.configs.files import PlantedFileError, append_file, create_once, file_lock, new_file, write_atomically
from biroute.configs.load import config_from_tree, write_config
from biroute.configs.records import last_lines
from biroute.data_pipeline.prepare.tokenizer import load_tokenizer
from biroute.data_pipeline.read.manifest import MANIFEST_NAME, ShardEntry, load_manifest
from biroute.data_pipeline.read.token_stream import open_shard
from biroute.launcher.attempts.journal import begin_attempt, read_attempts
from biroute.launcher.attempts.run_files import FENCING_TOKEN, JOURNAL
from biroute.launcher.track.metrics_log import read_points
from biroute.parallel.checkpoint.files import fingerprint
from biroute.parallel.checkpoint.meta import META_NAME, read_meta


def lock(path: Path) -> None:
    with file_lock(path, 0.0):
        pass


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A file of the victim's, which a link points to."""
    path = tmp_path / "mine"
    path.write_text("precious")
    return path


@pytest.mark.parametrize("write", [lock, lambda path: append_file(path).close()], ids=["lock", "append"])
def test_a_planted_link_is_refused(tmp_path: Path, mine: Path, write: Callable[[Path], None]) -> None:
    link = tmp_path / "link"
    link.symlink_to(mine)
    with pytest.raises(PlantedFileError, match=r"link is a symbolic link, which BiRoute does not write through"):
        write(link)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(PlantedFileError, match="fifo is not a regular file"):
        write(tmp_path / "fifo")
    assert mine.read_text() == "precious"


def test_a_planted_link_is_replaced(tmp_path: Path, mine: Path) -> None:
    for name in (".file.tmp", "file", "new"):  # the first is the draft of the second
        (tmp_path / name).symlink_to(mine)
    write_atomically(tmp_path / "file", b"content")
    new_file(tmp_path / "new").close()
    assert not (tmp_path / "file").is_symlink() and (tmp_path / "file").read_bytes() == b"content"
    assert not (tmp_path / "new").is_symlink() and (tmp_path / "new").read_bytes() == b""
    assert not create_once(tmp_path / "new", b"again")
    assert mine.read_text() == "precious"


def test_a_lock_keeps_the_content_of_its_file_and_excludes(mine: Path) -> None:
    with file_lock(mine, 0.0, required=True):
        with pytest.raises(TimeoutError), file_lock(mine, 0.05, required=True):
            pass
        with file_lock(mine, 0.05):
            pass  # not required: goes on without it
    with file_lock(mine, 0.0, required=True):
        pass
    assert mine.read_text() == "precious"


def test_a_journal_through_a_link_is_a_usage_error(tmp_path: Path, mine: Path) -> None:
    from biroute.configs.errors import UsageError

    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / JOURNAL).symlink_to(mine)
    with pytest.raises(UsageError, match=rf"run/{JOURNAL} is a symbolic link"):
        begin_attempt(run_dir, nodes=["n1"], world_size=1)
    assert mine.read_text() == "precious"


@pytest.mark.parametrize(
    ("uri", "mode"), [("http://me:secret@server:5000", 0o600), ("http://server:5000", 0o644), ("", 0o644)]
)
def test_a_configuration_with_a_password_is_only_for_its_owner(tmp_path: Path, uri: str, mode: int) -> None:
    before = os.umask(0o022)
    try:
        write_config(tmp_path / "config.yaml", config_from_tree({"tracking": {"uri": uri}}, "test"))
        write_atomically(tmp_path / "private", b"", private=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "config.yaml").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600


def shard_of(path: Path) -> None:
    open_shard(path.parent, ShardEntry.model_construct(file=path.name, size_bytes=1))


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("t.model", load_tokenizer),
        (MANIFEST_NAME, lambda path: load_manifest(path.parent)),
        ("train-000000.tar", shard_of),
        (META_NAME, lambda path: read_meta(path.parent)),
        ("weights.pt", fingerprint),
        (JOURNAL, lambda path: read_attempts(path.parent)),
        (FENCING_TOKEN, lambda path: begin_attempt(path.parent, nodes=[], world_size=1)),
        ("metrics.jsonl", read_points),
        ("left_nodes", lambda path: last_lines(path, 1)),
    ],
)
def test_nobody_waits_for_the_writer_of_a_pipe(tmp_path: Path, name: str, read: Callable[[Path], object]) -> None:
    def too_long(*_: object) -> None:
        raise AssertionError(f"{name}: waits for a writer")

    os.mkfifo(tmp_path / name)
    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(5)
    try:
        with pytest.raises((OSError, UsageError), match="it is not a regular file"):
            read(tmp_path / name)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
