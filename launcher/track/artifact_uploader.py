"""The thread that uploads a run's files and names its checkpoints: it must not delay metrics, so it is apart."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from biroute.launcher.attempts.run_files import CHECKPOINTS
from biroute.launcher.track.mlflow_errors import Trouble, http_status
from biroute.launcher.track.upload_state import TrackingState

_LOOK_SECONDS = 10.0  # between two looks at the files, and at least between two uploads of the same one
_LONGEST_PAUSE_SECONDS = 300.0  # between two tries of a file


class FileDestination(Protocol):
    """Where files go."""

    def log_artifact(self, path: Path) -> None: ...

    def log_checkpoints(self) -> None:
        """Bring what the store has of the run's checkpoints up to date."""

    def explain(self, error: Exception) -> Trouble: ...

    def seconds_to_wait(self) -> float:
        """Return for how many seconds a busy store still wants to be left alone; 0 if it does not."""


class ArtifactUploader(threading.Thread):
    """Uploads files and folders, again when they change. A version that is refused is given up, and that is said."""

    def __init__(
        self,
        run_dir: Path,
        state: TrackingState,
        destination: FileDestination,
        say: Callable[[str], None],
    ) -> None:
        """Nothing is sent or noted any more once `state.owned()` is false: another attempt is then responsible."""
        super().__init__(name="biroute-artifacts", daemon=True)
        self._run_dir, self._state, self._destination, self._say = run_dir, state, destination, say
        self._new: deque[Path] = deque()
        self._uploaded_at: dict[str, float] = {}
        self._failed: dict[str, tuple[str, int, float]] = {}  # path -> version, tries, when to try again
        self._wake, self._closing, self._done = (threading.Event() for _ in range(3))

    def add(self, path: Path) -> None:
        """Upload `path` soon, and again whenever it changes. It may not exist yet."""
        self._new.append(path)
        self._wake.set()

    def finish(self, seconds: float) -> None:
        """Make a last pass and wait for it, `seconds` at most; what is not sent then, the next attempt sends."""
        self._closing.set()
        self._wake.set()
        if self.is_alive():
            self._done.wait(seconds)
        else:
            self._take_in()

    def run(self) -> None:
        """Upload until the last pass is done."""
        while True:
            self._wake.wait(_LOOK_SECONDS)
            self._wake.clear()
            last_pass = self._closing.is_set()
            if not self._state.owned():
                self._done.set()
                return
            self._take_in()
            for key in list(self._state.artifacts):
                self._send(key)
            self._send_checkpoints()
            if last_pass:
                self._done.set()
                return

    def _take_in(self) -> None:
        """Record new paths in the state file immediately, so that after a kill the next attempt uploads them."""
        added = False
        while self._new:
            self._state.artifacts.setdefault(os.path.relpath(self._new.popleft().absolute(), self._run_dir), "")
            added = True
        if added:
            self._save()

    def _send(self, key: str) -> None:
        recently = time.monotonic() - self._uploaded_at.get(key, -math.inf) < _LOOK_SECONDS
        if recently and not self._closing.is_set():
            return
        path = self._run_dir / key
        if not is_inside(path, self._run_dir):
            return
        version = _version(path)  # before the upload, so that a change during it is noticed next time
        if version in (None, self._state.artifacts.get(key)):
            return
        failed, _, again_at = self._failed.get(key, ("", 0, 0.0))
        if (failed == version and time.monotonic() < again_at) or self._destination.seconds_to_wait():
            return
        try:
            self._destination.log_artifact(path.resolve())
        except Exception as error:  # of any kind: it must hold up neither the other files nor training
            self._fail(path, key, str(version), error)
            return
        self._uploaded_at[key] = time.monotonic()
        self._failed.pop(key, None)
        self._state.artifacts[key] = str(version)
        self._save()

    def look(self) -> None:
        """Look for new checkpoints soon."""
        self._wake.set()

    def _send_checkpoints(self) -> None:
        _, tries, again_at = self._failed.get(CHECKPOINTS, ("", 0, 0.0))
        if time.monotonic() < again_at and not (self._closing.is_set() and math.isfinite(again_at)):
            return
        if self._destination.seconds_to_wait():
            return
        try:
            self._destination.log_checkpoints()
        except Exception as error:  # of any kind, also of a store that knows no such models
            pause = pause_after(error, tries + 1)
            self._failed[CHECKPOINTS] = "", tries + 1, time.monotonic() + pause
            if tries == 1 or math.isinf(pause):
                later = "they are not shown there" if math.isinf(pause) else "they are shown later"
                self._say(f"takes no checkpoints ({self._destination.explain(error).reason}); {later}")
            return
        self._failed.pop(CHECKPOINTS, None)

    def _fail(self, path: Path, key: str, version: str, error: Exception) -> None:
        before, tries, _ = self._failed.get(key, ("", 0, 0.0))
        tries = tries + 1 if before == version else 1
        pause = pause_after(error, tries)
        refused = math.isinf(pause)
        reason = self._destination.explain(error).reason
        if refused:
            self._say(f"refuses the file {path} ({reason}); it stays there, and metrics are not affected")
        elif tries == 2:  # not after the first: the next try may succeed
            self._say(f"the file {path} is not uploaded yet ({reason}); it is tried again, metrics are not affected")
        self._failed[key] = (version, tries, time.monotonic() + pause)

    def _save(self) -> None:
        try:
            self._state.save()
        except OSError:  # said by the uploader, which saves it too; a file sent twice does no harm
            return


def pause_after(error: Exception, tries: int) -> float:
    """Return the seconds until the next try; infinite after a refusal."""
    status = http_status(error)
    if status is not None and 400 <= status < 500 and status not in (408, 429):
        return math.inf
    return min(_LOOK_SECONDS * 2 ** min(tries, 10), _LONGEST_PAUSE_SECONDS)


def send_artifacts(
    run_dir: Path, state: TrackingState, destination: FileDestination, say: Callable[[str], None]
) -> int:
    """Upload each file that has changed since it was last sent; returns their number. One that fails is said."""
    sent = 0
    try:
        destination.log_checkpoints()
    except Exception as error:  # of any kind, as below
        say(f"the checkpoints are not shown: {destination.explain(error).reason}")
    for key, before in list(state.artifacts.items()):
        path = run_dir / key
        version = _version(path) if is_inside(path, run_dir) else None
        if version in (None, before):
            continue
        try:
            destination.log_artifact(path.resolve())
        except Exception as error:  # of any kind: it must not keep back the others, nor the end of the run
            say(f"the file {path} is not uploaded: {destination.explain(error).reason}")
            continue
        state.artifacts[key] = str(version)
        state.save()
        sent += 1
    return sent


def is_inside(path: Path, run_dir: Path) -> bool:
    """Return whether a path lies in the run folder: its list of files may come from somebody else."""
    try:
        return path.resolve().is_relative_to(run_dir.resolve())
    except (OSError, ValueError, RuntimeError):  # a circle of links, a NUL
        return False


def _version(path: Path) -> str | None:
    """Return a text that changes when the file, or a file in the folder, does; None if there is no such path."""
    try:
        files = sorted(inner for inner in path.rglob("*") if inner.is_file()) if path.is_dir() else [path]
        stats = [file.stat() for file in files]
    except OSError:
        return None
    newest_ns = max((stat.st_mtime_ns for stat in stats), default=0)
    return f"{len(stats)}:{sum(stat.st_size for stat in stats)}:{newest_ns}"
