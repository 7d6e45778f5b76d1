"""State of the uploader, from which the next attempt continues: `tracking_state.json` in the run folder."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from biroute.configs.files import write_atomically
from biroute.configs.records import parse_json, read_small, record_of
from biroute.launcher.attempts.journal import read_attempts
from biroute.launcher.attempts.run_files import MLFLOW_RUN

_saving = threading.Lock()  # points and artifacts are sent by two threads
_Id = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]  # as uuid makes them, and MLflow's run ids
_Milliseconds = Annotated[int, Field(ge=0, le=10**14)]
_Path = Annotated[str, Field(pattern=r"^[^\x00]+$")]
Status = Literal["FINISHED", "FAILED", "KILLED"]
End = tuple[Status, _Milliseconds, str]  # of an attempt: status, time, cause
_NOT_SAVED = ("path", "kept", "owned")


@dataclass(frozen=True)
class DatasetFacts:
    """What MLflow shows of a dataset."""

    name: str
    digest: str
    source: str
    profile: str


@dataclass
class KnownCheckpoint:
    """What MLflow has of a checkpoint, as a logged model."""

    model_id: str = ""  # "" until it is created
    linked: list[str] = field(default_factory=list)  # metrics of its step that the model has
    removed: bool = False  # its folder is gone, and the model says so


def _always() -> bool:
    return True


@dataclass(frozen=True)
class _Run:
    run_key: _Id
    run_id: _Id | None


@dataclass
class TrackingState:
    """How far the metrics log is uploaded, and to which MLflow run. Saved atomically."""

    path: Path
    target: str  # URI without password, and experiment; "": never tracked so far
    run_key: _Id = field(default_factory=lambda: uuid.uuid4().hex)  # finds a run whose creation was not confirmed
    run_id: _Id | None = None
    run_name: str = ""  # as it was last set; a name that a person has given stays
    sent_bytes: int = 0
    attempt: int = 0  # starts of this run so far
    started_ms: _Milliseconds = field(default_factory=lambda: time.time_ns() // 1_000_000)  # of the first attempt
    artifacts: dict[_Path, str] = field(default_factory=dict)  # path from the run folder -> fingerprint sent, or ""
    checkpoints: dict[str, KnownCheckpoint] = field(default_factory=dict)  # by step
    home: str = ""  # the run folder; another one is a copy if this one is still there
    copied_from: str = ""  # run folder and MLflow run that this one is a copy of
    headline: str = ""  # what is trained, in which layout
    tags: dict[str, str] = field(default_factory=dict)  # given by the last attempt
    datasets: dict[str, DatasetFacts] = field(default_factory=dict)  # by context, such as "train"
    kept: tuple[str, str | None] | None = field(default=None, init=False, repr=False, compare=False)  # in MLFLOW_RUN
    end: End | None = None  # status, time in ms and cause of an end that is not sent yet
    owned: Callable[[], bool] = field(default_factory=lambda: _always, init=False, repr=False, compare=False)

    @classmethod
    def load(cls, path: Path, target: str, metrics_log_bytes: int, notify: Callable[[str], None]) -> TrackingState:
        """Read the state, or create a new one; with an empty target it is only kept, for a later `track sync`.

        For another experiment than before all is sent again, to a new run. At another address the run is looked for,
        since that may be another name of the same server.

        Raises:
            OSError: the file exists and cannot be read.
        """
        try:
            state = read_state(path)
        except FileNotFoundError:
            return cls._new(path, target)
        except (ValueError, TypeError):
            notify(
                f"{path}: unreadable; all is compared with the MLflow run, and sent again where it lacks something"
            )
            return cls._new(path, target)
        state._settle(notify)
        if target not in ("", state.target):
            if state.target:
                notify(f"earlier attempts were sent to {state.target}, this one goes to {target}, with all before it")
                if state.target.partition(" ")[2] != target.partition(" ")[2]:
                    state.begin_new_run()
            state.target, state.sent_bytes = target, 0
            state.artifacts = dict.fromkeys(state.artifacts, "")
            state.checkpoints = {step: KnownCheckpoint() for step in state.checkpoints}
        if state.sent_bytes > metrics_log_bytes:  # the metrics log was replaced
            state.sent_bytes = 0
        return state

    @classmethod
    def _new(cls, path: Path, target: str) -> TrackingState:
        """Begin anew, with the run that this folder is known to have."""
        state = cls(path, target, home=str(path.parent.resolve()))
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            known = record_of(_Run, parse_json(read_small(path.with_name(MLFLOW_RUN))))
            state.run_key, state.run_id = known.run_key, known.run_id
        began = [attempt.began for attempt in read_attempts(path.parent)]
        state.started_ms = int(1000 * min(began)) if began else state.started_ms
        state.attempt = len(began)
        return state

    def _settle(self, notify: Callable[[str], None]) -> None:
        """Notice a run folder that was copied: two runs must not write into one run of MLflow."""
        home, here = self.home, str(self.path.parent.resolve())
        self.home = here
        if home in ("", here):
            return
        with contextlib.suppress(OSError, ValueError, TypeError):
            other = Path(home) / self.path.name
            if other.samefile(self.path) or read_state(other).run_key != self.run_key:
                return  # the same folder under another path is no copy
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
        self.checkpoints = {step: KnownCheckpoint() for step in self.checkpoints}

    def save(self) -> None:
        """Write the file, unless another attempt owns the run folder: it has got further.

        Raises:
            OSError: the write failed; the file keeps its previous content.
        """
        with _saving:
            values = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in _NOT_SAVED}
            values["datasets"] = {context: asdict(facts) for context, facts in self.datasets.items()}
            values["checkpoints"] = {step: asdict(known) for step, known in self.checkpoints.items()}
            content = json.dumps(values, indent=1, ensure_ascii=False).encode()
            if not self.owned():  # asked last: a call to a server may have lasted, and a lost node stands still
                return
            write_atomically(self.path, content, durable=False)
            if self.kept != (known := (self.run_key, self.run_id)):
                write_atomically(self.path.with_name(MLFLOW_RUN), json.dumps(asdict(_Run(*known))).encode())
                self.kept = known


def read_state(path: Path) -> TrackingState:
    """Read a state; raises OSError, or ValueError if it is damaged."""
    return record_of(TrackingState, {**parse_json(read_small(path)), "path": path})
