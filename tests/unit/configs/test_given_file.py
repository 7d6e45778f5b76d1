"""A configuration may be a pipe, as `<(command)` is one, and nobody waits for ever for what is in it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from biroute.configs.errors import UsageError
from biroute.configs.given_file import read_given
from biroute.configs.load import load_config

TEXT = "train:\n  steps: 12\n"


def test_a_pipe_without_a_writer_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    os.mkfifo(path)
    with pytest.raises(OSError, match=r"a pipe to which nobody wrote for 0\.2 s; start its writer, or name a file"):
        read_given(path, writer_seconds=0.2)


@pytest.mark.parametrize("silent_seconds", [0.0, 0.5])
def test_a_slow_writer_is_waited_for(tmp_path: Path, silent_seconds: float) -> None:
    """It opens the pipe late, and writes in two parts, the first of them later than a missing writer is noticed."""
    path = tmp_path / "run.yaml"
    os.mkfifo(path)

    def write() -> None:
        time.sleep(0.1)
        with path.open("w") as pipe:
            time.sleep(silent_seconds)
            pipe.write(TEXT[:5])
            pipe.flush()
            time.sleep(0.2)
            pipe.write(TEXT[5:])

    writer = threading.Thread(target=write)
    writer.start()
    assert read_given(path, writer_seconds=0.3) == TEXT
    writer.join()


def test_process_substitution() -> None:
    ours, theirs = os.pipe()
    os.write(theirs, TEXT.encode())
    os.close(theirs)
    assert load_config(f"/dev/fd/{ours}").train.steps == 12
    os.close(ours)


def test_what_is_no_configuration_ends(tmp_path: Path) -> None:
    """Also where it has no end."""
    with pytest.raises(
        UsageError, match=r"/dev/zero: not a readable YAML file \(more than 16 MiB; is it another file"
    ):
        load_config("/dev/zero")
    with pytest.raises(UsageError, match=r"not a readable YAML file .*Is a directory"):
        load_config(tmp_path)
