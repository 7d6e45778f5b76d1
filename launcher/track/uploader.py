"""The uploader: a thread that follows a run's metrics log and sends new points, retrying for as long as needed."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from biroute.launcher.attempts.run_files import METRICS_LOG, UPLOAD_STATE
from biroute.launcher.track.artifact_uploader import ArtifactUploader
from biroute.launcher.track.metrics_log import Point, scan
from biroute.launcher.track.mlflow_errors import Trouble
from biroute.launcher.track.upload_state import End, Status, TrackingState, read_state

_SEND_SECONDS = 1.0  # at most one pass per second: sending costs CPU time that training needs
_LOOK_SECONDS = 10.0  # without new points
_NOTE_SECONDS = 60.0  # between two updates of the description
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS, _CLOSING_PAUSE_SECONDS = 0.5, 10.0, 0.5
_PERMANENT_PAUSE_SECONDS = 60.0  # where only a person can mend it
_REMIND_SECONDS = 3600.0
_MOST_METRICS, _FEWEST_METRICS = 1000, 50  # of a call
_LONGEST_CALL_SECONDS = 120.0
_LATELY_SECONDS = 60.0  # who has not answered since then is not waited for at the end
_LAST_TRY_SECONDS = 2.0


class Destination(Protocol):
    """Where points are sent. Any method may block until the timeout and raise anything; all are safe to repeat."""

    page: str  # where people see the run; "" until connected

    def connect(self) -> None:
        """Find or create the run that `TrackingState` names."""

    def log_points(self, points: list[Point], end_byte: int) -> None: ...

    def log_artifact(self, path: Path) -> None: ...

    def log_checkpoints(self) -> None: ...

    def update_note(self, cause: str) -> None:
        """Renew the description; `cause` is why the attempt ends, if it does."""

    def terminate(self, status: Status, end_ms: int, cause: str) -> None: ...

    def lost_run(self, error: Exception) -> bool:
        """Return whether `error` means that `connect` must be called again."""

    def explain(self, error: Exception) -> Trouble: ...

    def seconds_to_wait(self) -> float:
        """Return for how many seconds a busy server still wants to be left alone; 0 if it does not."""

    def set_timeout(self, seconds: float) -> None: ...


class Uploader(threading.Thread):
    """Sends new points of the metrics log, the artifacts and the final status. No error here reaches training.

    The thread ends as soon as `state.owned()` is false, as another attempt is then responsible.
    """

    def __init__(
        self,
        metrics_log_path: Path,
        state: TrackingState,
        destination: Destination,
        say: Callable[[str], None],
        *,
        timeout_seconds: float,
    ) -> None:
        super().__init__(name="biroute-tracking", daemon=True)  # daemon: a frozen server must not delay the exit
        self._metrics_log_path, self._state, self._destination, self._say = metrics_log_path, state, destination, say
        self._artifacts = ArtifactUploader(metrics_log_path.parent.absolute(), state, destination, say)
        self._timeout, self._first_timeout = timeout_seconds, timeout_seconds
        self._metrics_per_call = _MOST_METRICS
        self._connected = False
        self._failures = 0
        self._trouble = Trouble("")
        self._told: tuple[float, str] | None = None  # when people were last told of a trouble, and of which
        self._answered_at = self._noted_at = float("-inf")
        self._wake, self._closing, self._given_up, self._done = (threading.Event() for _ in range(4))
        self._wake.set()  # an earlier attempt may have left points unsent

    def wake(self) -> None:
        """Signal that the metrics log has new points."""
        self._wake.set()

    def add_artifact(self, path: Path) -> None:
        """Upload `path` soon, and again whenever it changes."""
        self._artifacts.add(path)

    def look_for_checkpoints(self) -> None:
        """Signal that a checkpoint was saved."""
        self._artifacts.look()

    def finish(self, end: End, seconds: float) -> None:
        """Make a last pass and wait for it, `seconds` at most; less if nothing has answered lately.

        `end` is the final status, the time in ms and the cause. What is not sent then, waits in the run folder.
        """
        if not self._state.owned():  # another attempt sends all from here on
            self._given_up.set()
            return
        start = time.monotonic()
        self._state.end = end
        with contextlib.suppress(OSError):  # a full disk; the pass may succeed all the same
            self._state.save()
        self._closing.set()
        self._wake.set()
        while not self._done.wait(0.05):
            waited = time.monotonic() - start
            silent = self._failures and time.monotonic() - self._answered_at > _LATELY_SECONDS
            if waited > (min(seconds, _LAST_TRY_SECONDS) if silent else seconds):
                break
        sent = self._done.is_set()
        if not sent:
            self._given_up.set()
            why = f" ({self._trouble.reason})" if self._failures else ""
            self._say(
                f"{self.waiting()} values and the end of the run are not sent{why}; the next attempt sends them, or "
                f"`biroute track sync {self._metrics_log_path.parent}`"
            )
        elif self._destination.page:
            self._say(f"all is sent: {self._destination.page}")
        self._artifacts.finish(max(0.0, seconds - (time.monotonic() - start)) if sent else 0.0)

    def run(self) -> None:
        """Send until the last pass is done."""
        while not self._given_up.is_set():
            self._wake.wait(_LOOK_SECONDS)
            self._wake.clear()
            # Read before the pass: what arrives during a pass needs another one.
            last_pass = self._closing.is_set()
            if not self._state.owned():
                self._done.set()
                return
            try:
                self._pass(last_pass)
            except Exception as error:  # of any kind: retried forever, never passed on to training
                self._fail(error)
                continue
            self._recover()
            if last_pass:
                self._done.set()
                return
            self._closing.wait(_SEND_SECONDS)

    def _pass(self, last: bool) -> None:
        if not self._connected:
            self._destination.connect()
            self._connected = True
            if not self._artifacts.is_alive():
                self._artifacts.start()
        try:
            self._send_points()
            if last or time.monotonic() - self._noted_at > _NOTE_SECONDS:
                self._destination.update_note(self._state.end[2] if last and self._state.end else "")
                self._noted_at = time.monotonic()
            if last and self._state.end is not None:
                self._destination.terminate(*self._state.end)
                self._state.end = None
                self._state.save()
        except Exception as error:
            if self._destination.lost_run(error):
                self._connected = False
            raise

    def _send_points(self) -> None:
        calls = send_points(self._metrics_log_path, self._state, self._destination, self._metrics_per_call)
        while not self._given_up.is_set() and next(calls, None) is not None:
            self._answered_at = time.monotonic()

    def _fail(self, error: Exception) -> None:
        self._failures += 1
        self._trouble = self._destination.explain(error)
        if self._trouble.timed_out:
            # A slow server: waiting in this thread costs nothing, and it may carry out what we gave up on.
            self._timeout = min(2 * self._timeout, max(_LONGEST_CALL_SECONDS, self._first_timeout))
            self._metrics_per_call = max(_FEWEST_METRICS, self._metrics_per_call // 2)
            self._destination.set_timeout(self._timeout)
        if self._worth_telling():
            self._told = time.monotonic(), self._trouble.reason
            self._say(f"{self._trouble.reason}{self._what_follows()}")
        self._pause()
        self._wake.set()

    def _worth_telling(self) -> bool:
        """Return whether people should hear of this failure: at first, hourly, and of what only they can mend."""
        if self._told is None:  # not of the first failure: a locked database is soon available again
            return self._failures >= 2 or self._trouble.permanent
        when, reason = self._told
        news = self._trouble.permanent and self._trouble.reason != reason
        return news or time.monotonic() - when > _REMIND_SECONDS

    def _what_follows(self) -> str:
        """Say what happens to the points after a failure."""
        wish = self._destination.seconds_to_wait()
        busy = f", and asks to be left alone for {wish:.0f} s" if wish else ""
        slow = f" (tracking.timeout_seconds={self._first_timeout:g}; calls now wait up to {self._timeout:g} s)"
        return (
            f"{busy}{slow if self._trouble.timed_out else ''}; training continues, {self.waiting()} values wait in "
            f"{self._metrics_log_path} and are sent later"
        )

    def waiting(self) -> int:
        """Return how many values of the metrics log are not sent yet."""
        return values_after(self._metrics_log_path, self._state.sent_bytes)

    def _recover(self) -> None:
        self._answered_at = time.monotonic()
        if self._told is not None:
            self._say("reached again, metrics are up to date")
        self._failures, self._told = 0, None
        self._metrics_per_call = min(_MOST_METRICS, 2 * self._metrics_per_call)

    def _pause(self) -> None:
        pause = min(_FIRST_PAUSE_SECONDS * 2 ** min(self._failures - 1, 10), _LONGEST_PAUSE_SECONDS)
        if self._trouble.permanent:
            pause = _PERMANENT_PAUSE_SECONDS
        pause *= random.uniform(0.75, 1.25)  # so that many runs do not come back at the same moment
        if self._closing.is_set():
            pause = min(pause, _CLOSING_PAUSE_SECONDS)  # little time is left, so retry often
        else:
            self._closing.wait(max(pause, self._destination.seconds_to_wait()))
            pause = 0.0
        self._given_up.wait(max(pause, self._destination.seconds_to_wait()))


class PointDestination(Protocol):
    """Where points are sent; sending one again must be safe."""

    def log_points(self, points: list[Point], end_byte: int) -> None: ...


def send_points(
    path: Path, state: TrackingState, destination: PointDestination, most_metrics: int = _MOST_METRICS
) -> Iterator[int]:
    """Send what a metrics log has got since `state` was saved, call by call; yields the values of each call.

    Raises:
        Exception: of any kind, from the destination.
        OSError: the metrics log cannot be read, or the state cannot be saved.
    """
    while True:
        points, end = next_batch(path, state.sent_bytes, most_metrics)
        if end == state.sent_bytes:
            return
        destination.log_points(points, end)
        state.sent_bytes = end
        state.save()
        yield sum(len(point.metrics) for point in points)


def next_batch(path: Path, start_byte: int, most_metrics: int = _MOST_METRICS) -> tuple[list[Point], int]:
    """Return the points from `start_byte` on, about `most_metrics` values, and the byte after them."""
    points: list[Point] = []
    end, count = start_byte, 0
    for point, after in scan(path, start_byte):
        if point is not None:
            if points and count + len(point.metrics) > most_metrics:
                break
            points.append(point)
            count += len(point.metrics)
        end = after
    return points, end


def values_after(path: Path, start_byte: int) -> int:
    """Return how many values a metrics log holds from `start_byte` on; 0 if it cannot be read."""
    try:
        return sum(len(point.metrics) for point, _ in scan(path, start_byte) if point is not None)
    except OSError:
        return 0


def values_waiting(run_dir: Path) -> int:
    """Return how many values of a run MLflow does not have yet; 0 if it is not tracked."""
    try:
        state = read_state(run_dir / UPLOAD_STATE)
        return values_after(run_dir / METRICS_LOG, state.sent_bytes) if state.target else 0
    except (OSError, ValueError, TypeError):
        return 0
