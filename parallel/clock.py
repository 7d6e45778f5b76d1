"""Where the time of a step goes: exclusive seconds per phase, nested phases subtracted from the outer one."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PHASES = ("data", "forward", "backward", "exchange", "optimizer")


class PhaseClock:
    """Adds up seconds per phase.

    `synchronize` waits for the device at each change of phase (torch.cuda.synchronize); on CPU there is nothing to
    wait for. It costs overlap, so it is called only while `exact` is set: on the steps that are logged.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.exact = True
        self._synchronize = synchronize
        self._running: list[str] = []
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._charge()
        self._running.append(name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def take(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        taken = {name: self.seconds.get(name, 0.0) for name in PHASES}
        self.seconds.clear()
        return taken

    def _charge(self) -> None:
        if self._synchronize is not None and self.exact:
            self._synchronize()
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now
