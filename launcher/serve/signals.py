"""The signals that end `biroute serve`. No torch."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

# Whoever signals a process and then its group, as `timeout` does, means it once.
_SAME_SECONDS = 1.0


@contextmanager
def end_signals() -> Iterator[SimpleQueue[int]]:
    """Yield a queue into which the first SIGTERM or SIGINT comes; a later one ends the process at once."""
    asked: SimpleQueue[int] = SimpleQueue()  # its `put` may interrupt its `get`, unlike the methods of an Event
    first: list[float] = []

    def take(number: int, _: Any) -> None:
        if not first:
            first.append(time.monotonic())
            asked.put(number)
        elif time.monotonic() - first[0] > _SAME_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    before = {number: signal.signal(number, take) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
