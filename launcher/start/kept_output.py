"""Keeps what a rank prints on a terminal in its log as well, so that it outlives the terminal."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import TextIO

from biroute.configs.files import append_file
from biroute.launcher.attempts.failures import log_file


def keep_output(logs: Path, rank: int) -> TextIO | None:
    """From now on, write standard error to the rank's log, too.

    Returns:
        The log, for what should be in it besides; None if the launcher already collects this rank's output in it.

    Raises:
        OSError: the log cannot be written.
    """
    path = log_file(logs, rank)
    if path.exists():
        return None
    log = io.TextIOWrapper(append_file(path), encoding="utf-8", errors="backslashreplace", line_buffering=True)
    sys.stderr = _Both(sys.stderr, log)
    return log


class _Both(io.TextIOBase):
    """Writes to a terminal and to a log. Neither a lost terminal nor a full disk is an error of what is printed."""

    def __init__(self, terminal: TextIO, log: TextIO) -> None:
        self._terminal, self._log = terminal, log

    def write(self, text: str) -> int:
        for stream in (self._terminal, self._log):
            with contextlib.suppress(OSError, ValueError):
                stream.write(text)
        return len(text)

    def flush(self) -> None:
        for stream in (self._terminal, self._log):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()

    def isatty(self) -> bool:
        return self._terminal.isatty()

    def fileno(self) -> int:
        """The terminal's: DeepSpeed redirects it while it tries a compiler."""
        return self._terminal.fileno()
