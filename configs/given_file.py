"""A file that a user names for reading: small, and of any kind, but nobody waits for ever for what is in it."""

from __future__ import annotations

import os
import select
import stat
import time
from pathlib import Path

LARGEST_GIVEN_BYTES = 16 << 20  # a configuration with 50,000 sources has 5 MB
_WRITER_SECONDS = 5.0
_LOOK_MILLISECONDS = 50


def read_given(path: Path, writer_seconds: float = _WRITER_SECONDS) -> str:
    """Read a text in UTF-8, also from a pipe, as `<(command)` of a shell is one.

    Args:
        path: the file.
        writer_seconds: how long to wait for somebody to open a pipe for writing; then for as long as it is open.

    Raises:
        OSError: it cannot be read, or nobody writes to the pipe.
        ValueError: it has more than 16 MiB, or is not UTF-8.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as raw:
        start = b""
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            start = _wait_for_writer(descriptor, writer_seconds)
        os.set_blocking(descriptor, True)
        chunks, size = [start], len(start)
        while size <= LARGEST_GIVEN_BYTES and (chunk := raw.read(1 << 20)):
            chunks.append(chunk)
            size += len(chunk)
    if size > LARGEST_GIVEN_BYTES:
        raise ValueError(f"more than {LARGEST_GIVEN_BYTES >> 20} MiB; is it another file?")
    return b"".join(chunks).decode("utf-8")


def _wait_for_writer(descriptor: int, seconds: float) -> bytes:
    """Return the first bytes of a pipe, or none as soon as it has a writer or had one that wrote nothing."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + seconds
    while True:
        events = poll.poll(_LOOK_MILLISECONDS)
        try:
            start = os.read(descriptor, 1 << 16)
        except BlockingIOError:  # a writer that has not written yet; without any, there is an end of file to read
            return b""
        if start or events or time.monotonic() >= deadline:
            break
    if not start and not events:
        raise OSError(f"it is a pipe to which nobody wrote for {seconds:g} s; start its writer, or name a file")
    return start
