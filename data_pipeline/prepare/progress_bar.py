"""Progress of long jobs on stderr: a bar with rate and time left on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

_PLAIN_LINE_SECONDS = 10.0


class Progress:
    """Shows the progress of successive stages, or nothing if `quiet`."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet

    def note(self, line: str) -> None:
        """Print a line."""
        if not self._quiet:
            print(line, file=self._stream, flush=True)

    @contextmanager
    def stage(self, title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
        """Yield a function to call with the number of bytes done so far."""
        if self._quiet:
            yield lambda done: None
        elif self._stream.isatty():
            with self._bar(title, total_bytes) as update:
                yield update
        else:
            yield from self._lines(title, total_bytes)

    @contextmanager
    def clock(self, title: str) -> Iterator[Callable[[float], None]]:
        """For work of unknown length: yield a function to call often with the seconds that have passed."""
        shown = 0.0

        def update(seconds: float) -> None:
            nonlocal shown
            if seconds - shown >= _PLAIN_LINE_SECONDS:
                shown = seconds
                self.note(f"{title}: {seconds:.0f} s so far")

        yield update

    @contextmanager
    def _bar(self, title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TextColumn("time left"),
            TimeRemainingColumn(),
        )
        with Bar(*columns, console=Console(file=self._stream)) as bar:
            task = bar.add_task(title, total=total_bytes)
            yield lambda done: bar.update(task, completed=done)

    def _lines(self, title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
        started = shown = time.monotonic()
        latest = 0

        def update(done: int) -> None:
            nonlocal shown, latest
            latest = done
            now = time.monotonic()
            if now - shown < _PLAIN_LINE_SECONDS:
                return
            shown = now
            rate = done / (now - started)
            left = f"{(total_bytes - done) / rate:.0f} s left" if rate else "time left unknown"
            self.note(
                f"{title}: {done / 1e6:.1f} of {total_bytes / 1e6:.1f} MB of files, "
                f"{done / max(1, total_bytes):.0%}, {rate / 1e6:.1f} MB/s, {left}"
            )

        yield update
        seconds = max(1e-9, time.monotonic() - started)
        self.note(f"{title}: {latest / 1e6:.1f} MB of files in {seconds:.1f} s, {latest / seconds / 1e6:.1f} MB/s")
