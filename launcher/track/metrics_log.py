"""The metrics log of a run, a write-ahead log: one JSON line per point, written before anything is uploaded.

A line is `{"step": 10, "time_ms": 1700000000000, "metrics": {"train/loss": 3.5}}`; values that JSON cannot
represent are the strings "nan", "inf" and "-inf". When `MetricsLog.append` returns, the operating system has the
line, so a SIGKILL of the process loses nothing.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from biroute.configs.files import append_file, open_regular
from biroute.configs.records import parse_json

_KEPT_IN_MEMORY = 10_000  # lines that are kept while the disk is full


@dataclass(frozen=True)
class Point:
    """Metrics of one optimizer step; `time_ms` is wall-clock time in milliseconds since 1970."""

    step: int
    time_ms: int
    metrics: dict[str, float]


def read_points(path: Path) -> list[Point]:
    """Read all complete points of a metrics log in the order of writing, skipping damaged lines and a torn last one.

    Raises:
        OSError: the file cannot be read.
    """
    return [point for point, _ in scan(path) if point is not None]


def scan(path: Path, start_byte: int = 0) -> Iterator[tuple[Point | None, int]]:
    """Yield each complete line from `start_byte` on as (point, byte after it); for a damaged line point is None."""
    end = start_byte
    with open_regular(path) as file:
        file.seek(start_byte)
        for line in file:
            if not line.endswith(b"\n"):
                return  # being written, or torn by a kill: MetricsLog repairs it when it opens the file
            end += len(line)
            yield _parse(line), end


def _parse(line: bytes) -> Point | None:
    try:
        fields = parse_json(line)
        metrics = {str(name): float(value) for name, value in fields["metrics"].items()}
        return Point(int(fields["step"]), int(fields["time_ms"]), metrics)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
    ):  # AttributeError: "metrics" is not an object
        return None


class MetricsLog:
    """Appends points to `path`. A (step, name) pair that the file already holds is not written again.

    So a resumed run, which repeats the steps after its checkpoint, adds no second point for any of them: the points
    of the earlier attempt stay. To be used from one thread.

    Raises:
        OSError: the file cannot be opened for writing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # One shared frozenset per combination of names, so that a long run costs only one dictionary entry per point.
        self._names_at_step: dict[int, frozenset[str]] = {}
        self._interned: dict[frozenset[str], frozenset[str]] = {}
        self._waiting: deque[bytes] = deque(maxlen=_KEPT_IN_MEMORY)
        # Unbuffered: every write is a system call, so nothing waits in this process.
        self._file = append_file(path, buffering=0)
        self._size = self._repair()
        for point, _ in scan(path):
            if point is not None:
                self._remember(point.step, point.metrics)

    @property
    def size_bytes(self) -> int:
        """Size of the complete lines in the file."""
        return self._size

    def append(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Write the metrics that this step does not have yet; returns False if it already had all of them.

        Raises:
            OSError: the write failed (disk full or gone). The point is kept in memory and written by the next append.
        """
        known = self._names_at_step.get(step, frozenset())
        fresh = {name: value for name, value in metrics.items() if name not in known}
        if not fresh:
            return False
        values = {name: value if math.isfinite(value) else str(value) for name, value in fresh.items()}
        fields = {"step": step, "time_ms": time.time_ns() // 1_000_000, "metrics": values}
        self._waiting.append(json.dumps(fields, ensure_ascii=False).encode() + b"\n")
        self._remember(step, fresh)
        self._write_waiting()
        return True

    def close(self) -> None:
        """Write the points kept in memory and close the file.

        Raises:
            OSError: the write failed again; these points are lost.
        """
        try:
            self._write_waiting()
        finally:
            self._file.close()

    def _write_waiting(self) -> None:
        while self._waiting:
            line = self._waiting[0]
            try:
                written = self._file.write(line)
            except OSError:
                self._cut()
                raise
            if written != len(line):
                self._cut()
                raise OSError(f"{self.path}: only {written} of {len(line)} bytes fit on the disk")
            self._size += len(line)
            self._waiting.popleft()

    def _cut(self) -> None:
        """Remove a half-written line, to which the next one would otherwise be appended."""
        self._file.truncate(self._size)

    def _repair(self) -> int:
        """Complete or remove a last line that lacks its newline; returns the size in bytes."""
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            tail_start = _after_last_newline(file, size)
            file.seek(tail_start)
            tail = file.read()
        if not tail:
            return size
        if _parse(tail) is not None:  # only the newline is missing
            self._file.write(b"\n")
            return size + 1
        self._file.truncate(tail_start)
        return tail_start

    def _remember(self, step: int, names: Mapping[str, float]) -> None:
        merged = self._names_at_step.get(step, frozenset()).union(names)
        self._names_at_step[step] = self._interned.setdefault(merged, merged)


def _after_last_newline(file: BinaryIO, size: int, block: int = 65_536) -> int:
    end = size
    while end > 0:
        start = max(0, end - block)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
