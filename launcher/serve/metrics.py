"""What a server has done, as Prometheus reads it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence

_COUNTERS = {
    "prompt_tokens": "Tokens of the prompts that were read.",
    "generated_tokens": "Tokens that were generated.",
    "cancelled": "Texts that ended because their client had gone.",
    "rejected": "Requests that were answered with 429, as too many were waiting.",
}
_GAUGES = {"running": "Texts that are being continued.", "waiting": "Texts that wait for a place."}
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters that any thread may add to.

    Attributes:
        gauges: name -> what to ask for its value.
    """

    def __init__(self) -> None:
        self.gauges: dict[str, Callable[[], int]] = {}
        self._counts: Counter[str] = Counter()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, name: str, count: int = 1) -> None:
        """Count something of `_COUNTERS`."""
        with self._lock:
            self._counts[name] += count

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a request that has been answered; `path` must be one of a few, or memory would grow."""
        with self._lock:
            self._requests[path, status] += 1
            self._seconds[path] += seconds  # type: ignore[assignment]

    def as_text(self) -> str:
        """Return all of them in Prometheus' text format 0.0.4."""
        with self._lock:
            lines = []
            for name, what in _COUNTERS.items():
                lines += _metric(f"biroute_{name}_total", "counter", what, [("", self._counts[name])])
            for name, what in _GAUGES.items():
                value = self.gauges[name]() if name in self.gauges else 0
                lines += _metric(f"biroute_{name}", "gauge", what, [("", value)])
            requests = [
                (f'{{path="{path}",status="{n}"}}', count) for (path, n), count in sorted(self._requests.items())
            ]
            lines += _metric("biroute_requests_total", "counter", "Requests that were answered.", requests)
            seconds = [(f'{{path="{path}"}}', total) for path, total in sorted(self._seconds.items())]
            lines += _metric("biroute_request_seconds_total", "counter", "Time that requests took, in sum.", seconds)
        return "\n".join(lines) + "\n"


def _metric(name: str, kind: str, what: str, values: Sequence[tuple[str, float]]) -> list[str]:
    return [
        f"# HELP {name} {what}",
        f"# TYPE {name} {kind}",
        *(f"{name}{labels} {value}" for labels, value in values),
    ]
