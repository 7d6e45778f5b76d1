"""Exclusive seconds per phase of a step: the time of nested phases is subtracted from the outer one."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

AXES = ("data", "pipeline", "region")  # whose communication has a phase of its own, `comm_data` and so on
COMMUNICATION = tuple(f"comm_{axis}" for axis in AXES)
PHASES = ("data", "forward", "backward", *COMMUNICATION, "optimizer")


class PhaseClock:
    """Adds up seconds per phase over the steps that it measures.

    `synchronize` waits for the device (torch.cuda.synchronize) at each change of phase, without which a phase would
    end before its kernels do. That costs overlap, so with it only the steps that are logged are measured.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._steps = 0
        self._measuring = True
        self._synchronize = synchronize
        self._running: list[str] = []
        self._since = time.perf_counter()

    def begin_step(self, logged: bool) -> None:
        """Begin a training step; `logged`: whether it ends with a log point."""
        self._measuring = logged or self._synchronize is None
        self._steps += self._measuring

    def end_step(self) -> None:
        """End a training step; phases after it do not count."""
        self._measuring = False

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as phase `name`."""
        self._charge()
        self._running.append(name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def take(self) -> dict[str, float]:
        """Return the seconds per phase, and `exchange`, those of all communication: the mean of a measured step."""
        steps = max(1, self._steps)
        taken = {name: self._seconds.get(name, 0.0) / steps for name in PHASES}
        taken["exchange"] = sum(taken[name] for name in COMMUNICATION)
        self._seconds.clear()
        self._steps = 0
        return taken

    def _charge(self) -> None:
        if not self._measuring:
            return
        if self._synchronize is not None:
            self._synchronize()
        now = time.perf_counter()
        if self._running:
            self._seconds[self._running[-1]] += now - self._since
        self._since = now
