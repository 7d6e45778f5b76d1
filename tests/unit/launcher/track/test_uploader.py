"""The rhythm of the uploader, against destinations that are slow, that refuse, or that never answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from biroute.launcher.track import uploader as module
from biroute.launcher.track.artifact_uploader import ArtifactUploader
from biroute.launcher.track.metrics_log import MetricsLog, Point
from biroute.launcher.track.mlflow_errors import Trouble
from biroute.launcher.track.upload_state import TrackingState
from biroute.launcher.track.uploader import Uploader

STEPS = 400
END = ("FINISHED", 1, "")


class Store:
    """Keeps what it is sent; `limit` may raise at each call."""

    page = "the page"

    def __init__(self, limit: Callable[[str, int], None] = lambda call, size: None) -> None:
        self.points: dict[tuple[int, str], float] = {}
        self.files: list[Path] = []
        self.ended: list[str] = []
        self.calls = 0
        self.timeout = 5.0
        self.left_alone_until = 0.0
        self._limit = limit

    def _call(self, name: str, size: int = 0) -> None:
        self.calls += 1
        self._limit(name, size)

    def connect(self) -> None:
        self._call("connect")

    def log_points(self, points: list[Point], end_byte: int) -> None:
        self._call("points", len(points))
        self.points |= {(point.step, name): value for point in points for name, value in point.metrics.items()}

    def log_artifact(self, path: Path) -> None:
        self._call("file")
        self.files.append(path)

    def log_checkpoints(self) -> None:
        self._call("checkpoints")

    def update_note(self, cause: str) -> None:
        self._call("note")

    def terminate(self, status: str, end_ms: int, cause: str) -> None:
        self._call("end")
        self.ended.append(status)

    def lost_run(self, error: Exception) -> bool:
        return False

    def explain(self, error: Exception) -> Trouble:
        return Trouble(str(error), isinstance(error, PermissionError), isinstance(error, TimeoutError))

    def seconds_to_wait(self) -> float:
        return max(0.0, self.left_alone_until - time.monotonic())

    def set_timeout(self, seconds: float) -> None:
        self.timeout = seconds


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pauses of an outage, a hundred times shorter."""
    for name in ("_SEND_SECONDS", "_FIRST_PAUSE_SECONDS", "_LONGEST_PAUSE_SECONDS", "_PERMANENT_PAUSE_SECONDS"):
        monkeypatch.setattr(module, name, getattr(module, name) / 100)


def begin(tmp_path: Path, store: Any, *, timeout: float = 5.0) -> tuple[Uploader, list[str]]:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, STEPS + 1):
        log.append(step, {"a": 1.0 / step, "b": 2.0})
    state = TrackingState(tmp_path / "tracking_state.json", "store experiment")
    said: list[str] = []
    uploader = Uploader(log.path, state, store, said.append, timeout_seconds=timeout)
    return uploader, said


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


@pytest.mark.usefixtures("quick")
def test_a_slow_server_gets_smaller_calls_and_more_time(tmp_path: Path) -> None:
    """Each call needs a tenth of a second for a point, against a time-out of 5 s: not one of 400 fits at first."""

    def slow(call: str, size: int) -> None:
        if size * 0.1 > store.timeout:
            raise TimeoutError("timed out")

    store = Store(slow)
    uploader, said = begin(tmp_path, store)
    uploader.start()
    until(lambda: len(store.points) == 2 * STEPS)
    assert store.timeout > 5.0 and store.calls < 20
    uploader.finish(END, 20)
    assert store.ended == ["FINISHED"]
    assert "timed out (tracking.timeout_seconds=5; calls now wait up to 20 s); training continues" in said[0]


@pytest.mark.usefixtures("quick")
def test_an_attempt_that_is_overtaken_during_a_call_writes_nothing_more(tmp_path: Path) -> None:
    """As on a lost node, which stands still in a call and goes on when another attempt has finished the run."""
    newer = b"the state of the next attempt"

    calls: list[str] = []

    def overtaken(call: str, size: int) -> None:
        calls.append(call)
        if call == "points":
            uploader._state.owned = lambda: False
            (tmp_path / "tracking_state.json").write_bytes(newer)

    uploader, _ = begin(tmp_path, Store(overtaken))
    uploader.start()
    uploader.join(20)
    assert not uploader.is_alive()
    assert calls.count("points") == 1
    assert (tmp_path / "tracking_state.json").read_bytes() == newer


@pytest.mark.usefixtures("quick")
def test_what_only_a_person_can_mend_is_said_at_once_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_REMIND_SECONDS", 0.5)

    def refuse(call: str, size: int) -> None:
        raise PermissionError("wrong password")

    store = Store(refuse)
    uploader, said = begin(tmp_path, store)
    uploader.start()
    until(lambda: bool(said))
    assert store.calls == 1 and "wrong password; training continues, 800 values wait in" in said[0]
    until(lambda: len(said) == 2)
    assert store.calls < 5 and "wrong password" in said[1]
    start = time.monotonic()
    uploader.finish(END, 30)
    assert time.monotonic() - start < 5  # it has never answered, so it is not waited for
    assert said[-1].startswith("800 values and the end of the run are not sent (wrong password)")
    assert f"biroute track sync {tmp_path}" in said[-1]


@pytest.mark.usefixtures("quick")
def test_a_file_that_is_refused_delays_no_metric_and_is_named(tmp_path: Path) -> None:
    def refuse(call: str, size: int) -> None:
        if call == "file":
            raise RuntimeError("API request failed with error code 413 != 200")

    store = Store(refuse)
    uploader, said = begin(tmp_path, store)
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"x")
    uploader.add_artifact(picture)
    uploader.start()
    until(lambda: bool(said))
    until(lambda: len(store.points) == 2 * STEPS)
    calls = store.calls
    start = time.monotonic()
    uploader.finish(END, 30)
    assert time.monotonic() - start < 5 and store.calls <= calls + 4  # the file is not tried again
    assert store.ended == ["FINISHED"]
    assert f"refuses the file {picture}" in said[0] and "metrics are not affected" in said[0]
    assert said[1:] == ["all is sent: the page"]


@pytest.mark.usefixtures("quick")
def test_a_server_that_is_good_only_now_and_then_gets_everything(tmp_path: Path) -> None:
    def flicker(call: str, size: int) -> None:
        if store.calls % 8 < 5:
            raise ConnectionError("refused")

    store = Store(flicker)
    uploader, _ = begin(tmp_path, store)
    uploader.start()
    until(lambda: len(store.points) == 2 * STEPS)
    uploader.finish(END, 20)
    assert store.ended == ["FINISHED"]


@pytest.mark.usefixtures("quick")
def test_a_server_that_wants_to_be_left_alone_is_also_at_the_end(tmp_path: Path) -> None:
    calls: list[float] = []

    def busy(call: str, size: int) -> None:
        calls.append(time.monotonic())
        if len(calls) <= 3:
            store.left_alone_until = time.monotonic() + 0.8
            raise ConnectionError("answers 503")

    store = Store(busy)
    uploader, said = begin(tmp_path, store)
    uploader.start()
    until(lambda: len(calls) == 2)
    uploader.finish(END, 20)
    assert store.ended == ["FINISHED"] and len(store.points) == 2 * STEPS
    assert all(second - first >= 0.8 for first, second in pairwise(calls[:4]))
    assert said[0].startswith("answers 503, and asks to be left alone for 1 s; training continues")


def test_files_and_checkpoints_leave_a_busy_server_alone_too(tmp_path: Path) -> None:
    store = Store()
    (tmp_path / "picture.png").write_bytes(b"x")
    state = TrackingState(tmp_path / "tracking_state.json", "store experiment")
    files = ArtifactUploader(tmp_path, state, store, print)

    def send() -> int:
        files._send("picture.png")
        files._send_checkpoints()
        return store.calls

    store.left_alone_until = time.monotonic() + 60  # which the points were told
    assert send() == 0
    store.left_alone_until = 0.0
    assert send() == 2 and store.files == [tmp_path / "picture.png"]


def test_no_pause_is_longer_than_ten_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploader, _ = begin(tmp_path, Store())
    pauses: list[float] = []
    monkeypatch.setattr(uploader._closing, "wait", pauses.append)
    for _ in range(50):
        uploader._fail(ConnectionError("refused"))
    assert max(pauses) <= 12.5 and len(set(pauses)) == 50  # with jitter, so that runs do not come back together
