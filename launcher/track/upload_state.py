"""State of the uploader, from which the next attempt continues: `tracking_state.json` in the run folder."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

from biroute.configs.files import write_atomically
from biroute.configs.records import parse_json, read_small, record_of

_saving = threading.Lock()  # points and artifacts are sent by two threads


@dataclass
class TrackingState:
    """How far the metrics log is uploaded, and to which MLflow run. Saved atomically."""

    path: Path
    target: str  # URI without password, and experiment
    run_key: str = field(default_factory=lambda: uuid.uuid4().hex)  # finds a run whose creation was not confirmed
    run_id: str | None = None
    sent_bytes: int = 0
    attempt: int = 0  # starts of this run so far
    started_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)  # of the first attempt
    artifacts: dict[str, str] = field(default_factory=dict)  # path from the run folder -> fingerprint sent, or ""
    home: str = ""  # the run folder; another one is a copy if this one is still there
    copied_from: str = ""  # run folder and MLflow run that this one is a copy of
    headline: str = ""  # what is trained, in which layout
    tags: dict[str, str] = field(default_factory=dict)  # given by the last attempt
    datasets: dict[str, dict[str, str]] = field(default_factory=dict)  # context -> name, digest, source, profile
    end: tuple[str, int, str] | None = None  # status, time in ms and cause of an end that is not sent yet

    @classmethod
    def load(cls, path: Path, target: str, metrics_log_bytes: int, notify: Callable[[str], None]) -> TrackingState:
        """Read the state, or create a new one.

        For another experiment than before all is sent again, to a new run. At another address the run is looked for,
        since that may be another name of the same server.

        Raises:
            OSError: the file exists and cannot be read.
        """
        try:
            state = read_state(path)
        except FileNotFoundError:
            return cls(path, target, home=str(path.parent.resolve()))
        except (ValueError, TypeError):
            notify(f"{path}: unreadable; all points are sent again, to a new MLflow run")
            return cls(path, target, home=str(path.parent.resolve()))
        state._settle(notify)
        if state.target != target:
            notify(f"earlier attempts were sent to {state.target}, this one goes to {target}, with all before it")
            if state.target.partition(" ")[2] != target.partition(" ")[2]:
                state.begin_new_run()
            state.target, state.sent_bytes = target, 0
            state.artifacts = dict.fromkeys(state.artifacts, "")
        if state.sent_bytes > metrics_log_bytes:  # the metrics log was replaced
            state.sent_bytes = 0
        return state

    def _settle(self, notify: Callable[[str], None]) -> None:
        """Notice a run folder that was copied: two runs must not write into one run of MLflow."""
        home, here = self.home, str(self.path.parent.resolve())
        self.home = here
        if home in ("", here):
            return
        with contextlib.suppress(OSError, ValueError, TypeError):
            if read_state(Path(home) / self.path.name).run_key != self.run_key:
                return
            self.copied_from = f"{home}, MLflow run {self.run_id}"
            self.begin_new_run()
            notify(
                f"{here} is a copy of {home}: it goes on as a new MLflow run, whose tag copied_from names that one"
            )

    def begin_new_run(self) -> None:
        """Send everything again, to a run of its own."""
        self.run_key = uuid.uuid4().hex
        self.forget_run()

    def forget_run(self) -> None:
        """Send everything again, to a run that has yet to be found or created."""
        self.run_id, self.sent_bytes = None, 0
        self.artifacts = dict.fromkeys(self.artifacts, "")

    def save(self) -> None:
        """Write the file.

        Raises:
            OSError: the write failed; the file keeps its previous content.
        """
        with _saving:
            values = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "path"}
            content = json.dumps(values, indent=1, ensure_ascii=False).encode()
            write_atomically(self.path, content, durable=False)


def read_state(path: Path) -> TrackingState:
    """Read a state; raises OSError, or ValueError if it is damaged."""
    return record_of(TrackingState, {**parse_json(read_small(path)), "path": path})
