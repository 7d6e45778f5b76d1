"""A lock between processes that a frozen holder cannot keep for ever."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path

_WAIT_SECONDS = 0.02


@contextlib.contextmanager
def file_lock(path: Path, seconds: float) -> Iterator[None]:
    """Hold the lock of the file `path`, made if it is not there.

    Goes on without after `seconds`, where the holder may be frozen, and at once on a filesystem that has no locks.
    """
    deadline = time.monotonic() + seconds
    with path.open("w") as file:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_WAIT_SECONDS)
            except OSError:
                break
        yield
