"""The uploader: a thread that follows a run's metrics log and sends new points, retrying for as long as needed."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from biroute.launcher.track.metrics_log import Point, scan
from biroute.launcher.track.upload_state import TrackingState

_SEND_SECONDS = 1.0  # at most one pass per second: sending costs CPU time that training needs
_LOOK_SECONDS = 10.0  # between two checks of the artifacts, and at least between two uploads of the same one
_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS, _CLOSING_DELAY_SECONDS = 0.5, 30.0, 0.5
_METRICS_PER_BATCH = 1000


class Destination(Protocol):
    """Where points are sent. Any method may block until the timeout and raise anything; all are safe to repeat."""

    def connect(self) -> None:
        """Find or create the run that `TrackingState` names."""

    def log_points(self, points: list[Point]) -> None: ...

    def log_artifact(self, path: Path) -> None: ...

    def terminate(self, status: str, end_ms: int, cause: str) -> None: ...

    def lost_run(self, error: Exception) -> bool:
        """Return whether `error` means that the run is gone, so that `connect` must be called again."""

    def describe(self, error: Exception) -> str:
        """Return the cause in a few words."""


class Uploader(threading.Thread):
    """Sends new points of the metrics log, the artifacts and the final status. No error here reaches training.

    The thread ends as soon as `owned()` is false, as another attempt is then responsible.
    """

    def __init__(
        self,
        metrics_log_path: Path,
        state: TrackingState,
        destination: Destination,
        say: Callable[[str], None],
        owned: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__(name="biroute-tracking", daemon=True)  # daemon: a frozen server must not delay the exit
        self._metrics_log_path, self._state, self._destination, self._say = metrics_log_path, state, destination, say
        self._owned = owned
        self._connected = False
        self._final: tuple[str, int, str] | None = None  # status, end time in ms, cause
        self._final_sent = False
        self._new_artifacts: deque[Path] = deque()
        self._uploaded_at: dict[str, float] = {}
        self._wake, self._closing, self._given_up, self._done = (threading.Event() for _ in range(4))
        self._wake.set()  # an earlier attempt may have left points unsent

    def wake(self) -> None:
        """Signal that the metrics log has new points."""
        self._wake.set()

    def add_artifact(self, path: Path) -> None:
        """Upload `path` now, and again whenever it changes."""
        self._new_artifacts.append(path)
        self._wake.set()

    def finish(self, status: str, cause: str, seconds: float) -> None:
        """Request a last pass and wait for it, `seconds` at most."""
        self._final = (status, time.time_ns() // 1_000_000, cause)
        self._closing.set()
        self._wake.set()
        if not self._done.wait(seconds):
            self._given_up.set()
            self._say(f"not all was sent within flush_seconds={seconds:g}; the next attempt sends the rest")

    def run(self) -> None:
        failures = 0
        while not self._given_up.is_set():
            self._wake.wait(_LOOK_SECONDS)
            self._wake.clear()
            # Read before the pass: what arrives during a pass needs another one.
            last_pass = self._closing.is_set()
            if not self._owned():
                self._done.set()
                return
            try:
                self._pass()
            except Exception as error:  # of any kind: retried forever, never passed on to training
                failures += 1
                if failures == 2:  # not after the first: a locked database is soon available again
                    what = f"training continues, metrics are kept in {self._metrics_log_path} and sent later"
                    self._say(f"{self._destination.describe(error)}; {what}")
                self._pause(min(_FIRST_DELAY_SECONDS * 2 ** min(failures - 1, 10), _LONGEST_DELAY_SECONDS))
                self._wake.set()
                continue
            if failures >= 2:
                self._say("reached again, metrics are up to date")
            failures = 0
            if last_pass:
                self._done.set()
                return
            self._closing.wait(_SEND_SECONDS)

    def _pause(self, seconds: float) -> None:
        if self._closing.is_set():
            self._given_up.wait(min(seconds, _CLOSING_DELAY_SECONDS))  # little time is left, so retry often
        else:
            self._closing.wait(seconds)

    def _pass(self) -> None:
        self._take_in_artifacts()
        if not self._connected:
            self._destination.connect()
            self._connected = True
        try:
            self._send_points()
            # Before the artifacts: if one cannot be uploaded, the run must not stay RUNNING.
            if self._final is not None and not self._final_sent:
                self._destination.terminate(*self._final)
                self._final_sent = True
            self._send_artifacts()
        except Exception as error:
            if self._destination.lost_run(error):
                self._connected = self._final_sent = False
            raise

    def _send_points(self) -> None:
        while not self._given_up.is_set():
            points, end = next_batch(self._metrics_log_path, self._state.sent_bytes)
            if end == self._state.sent_bytes:
                return
            self._destination.log_points(points)
            self._state.sent_bytes = end
            self._state.save()

    def _take_in_artifacts(self) -> None:
        """Record new paths in the state file immediately, so that after a kill the next attempt uploads them."""
        if not self._new_artifacts:
            return
        while self._new_artifacts:
            key = os.path.relpath(self._new_artifacts.popleft().absolute(), self._run_dir)
            self._state.artifacts.setdefault(key, "")
        self._state.save()

    def _send_artifacts(self) -> None:
        failure: Exception | None = None
        for key, sent in list(self._state.artifacts.items()):
            recently = time.monotonic() - self._uploaded_at.get(key, -math.inf) < _LOOK_SECONDS
            if recently and not self._closing.is_set():
                continue
            path = self._run_dir / key
            fingerprint = _fingerprint(path)  # before the upload, so that a change during it is noticed next time
            if fingerprint is None or fingerprint == sent:
                continue
            try:
                self._destination.log_artifact(path.resolve())
            except Exception as error:  # it must not hold up the other artifacts
                failure = error
                continue
            self._uploaded_at[key] = time.monotonic()
            self._state.artifacts[key] = fingerprint
            self._state.save()
        if failure is not None:
            raise failure

    @property
    def _run_dir(self) -> Path:
        return self._metrics_log_path.parent.absolute()


def next_batch(path: Path, start_byte: int) -> tuple[list[Point], int]:
    """Return the points from `start_byte` on, about one batch of metrics, and the byte after them."""
    points: list[Point] = []
    end, count = start_byte, 0
    for point, after in scan(path, start_byte):
        if point is not None:
            if points and count + len(point.metrics) > _METRICS_PER_BATCH:
                break
            points.append(point)
            count += len(point.metrics)
        end = after
    return points, end


def _fingerprint(path: Path) -> str | None:
    """Return a text that changes when the file, or a file in the folder, does; None if there is no such path."""
    try:
        files = sorted(inner for inner in path.rglob("*") if inner.is_file()) if path.is_dir() else [path]
        stats = [file.stat() for file in files]
    except OSError:
        return None
    newest_ns = max((stat.st_mtime_ns for stat in stats), default=0)
    return f"{len(stats)}:{sum(stat.st_size for stat in stats)}:{newest_ns}"
