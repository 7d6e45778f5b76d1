"""Tracking of metrics, parameters and artifacts: kept in the run folder first, then uploaded to MLflow by a thread.

Training only appends lines to the metrics log, `metrics.jsonl`. The uploader follows that file and sends new points
with their original timestamps. It records in `tracking_state.json` how far it has got and in which MLflow run, so
whatever fails (server absent, killed or frozen; this process killed), the rest is sent later, at the latest by the
next attempt. Sending a point twice is harmless: MLflow keeps one row for each key, timestamp, step and value.

A resumed run continues the same MLflow run. The points of the steps that it repeats after its checkpoint are already
in the metrics log and are not written again: of each (step, metric) the first value stays.

This is the only file that imports mlflow, and it does so inside functions to keep `biroute --help` fast.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from biroute.configs.errors import UsageError
from biroute.configs.files import file_lock
from biroute.configs.load import load_config
from biroute.configs.messages import without_password
from biroute.configs.schema import RunConfig
from biroute.launcher.attempts.journal import FencingToken, read_attempts
from biroute.launcher.attempts.run_files import CONFIG, METRICS_LOG, UPLOAD_STATE
from biroute.launcher.track import run_metadata as run_metadata
from biroute.launcher.track.metrics_log import MetricsLog, Point
from biroute.launcher.track.upload_state import TrackingState
from biroute.launcher.track.uploader import Uploader
from biroute.launcher.track.uri import artifacts_dir, sqlite_path, tracking_uri

Status = Literal["FINISHED", "FAILED", "KILLED"]

_METRICS_PER_BATCH, _ENTRIES_PER_BATCH = 1000, 100  # MLflow's limits
_NAME_CHARACTERS = 250
_LOCK_SECONDS = 20.0
_RUN_KEY_TAG = "biroute.run_key"
_set_by_us: dict[str, str] = {}  # environment variables, so that the next tracker of this process may change them


def open_tracker(
    config: RunConfig,
    run_dir: Path,
    *,
    tags: Mapping[str, str],
    notify: Callable[[str], None] | None = None,
    fencing_token: FencingToken | None = None,
) -> Tracker:
    """Open the tracker of a run, on rank 0. With `tracking.enabled=false` only the metrics log is written.

    The first call in a process takes some seconds, to import mlflow and create a new SQLite file; it does not wait
    for a server.

    Args:
        config: of the run.
        run_dir: the run folder.
        tags: added to those that are found automatically, such as the layout and the world size.
        notify: called with the few messages for people (server lost, server back), also from another thread; by
            default they are logged.
        fencing_token: if given, nothing is written or sent once another attempt owns the folder.

    Raises:
        UsageError: `tracking.uri` is malformed or of an unsupported scheme, or `run_dir` cannot be written.
    """
    owned = fencing_token.holds if fencing_token else lambda: True
    notify = notify or logging.getLogger(__name__).warning
    # Checked first, so that a bad URI leaves nothing behind.
    uri = tracking_uri(config, run_dir) if config.tracking.enabled else None
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        metrics_log = MetricsLog(run_dir / METRICS_LOG)
        if uri is None:
            return Tracker(metrics_log, None, notify, flush_seconds=0.0, owned=owned)
        target = f"{without_password(uri)} {config.tracking.experiment}"
        state = TrackingState.load(run_dir / UPLOAD_STATE, target, metrics_log.size_bytes, notify)
        state.attempt = fencing_token.attempt if fencing_token else state.attempt + 1
        state.save()
    except OSError as error:
        reason = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
        raise UsageError(f"train.run_dir={run_dir}: {reason}; use a writable folder") from None
    _prepare_mlflow(uri, config.tracking.timeout_seconds)

    def say(text: str) -> None:
        with contextlib.suppress(Exception):  # the terminal may be gone
            notify(f"MLflow ({without_password(uri)}): {text}")

    destination = _MlflowRun(config, run_dir, uri, state, dict(tags), say)
    if sqlite_path(uri) is not None:
        # Creating the tables triggers a garbage collection of up to half a second, during which no thread runs:
        # better now than in the middle of a step. If it fails, the uploader tries again.
        with contextlib.suppress(Exception):
            destination.open_client()
    uploader = Uploader(metrics_log.path, state, destination, say, owned)
    uploader.start()
    return Tracker(metrics_log, uploader, notify, flush_seconds=config.tracking.flush_seconds, owned=owned)


def close_after_crash(fencing_token: FencingToken) -> None:
    """Report the end of an attempt and its cause to MLflow if the attempt itself could not. Never raises."""
    run_dir = fencing_token.run_dir
    try:
        config = load_config(run_dir / CONFIG)
        if fencing_token.holds() and config.tracking.enabled and (run_dir / UPLOAD_STATE).exists():
            open_tracker(config, run_dir, tags={}, notify=lambda _: None, fencing_token=fencing_token).close("FAILED")
    except Exception as error:
        logging.getLogger(__name__).warning("the end of the run could not be reported to MLflow: %s", error)


class Tracker:
    """Tracks one attempt. `log`, `log_artifact` and `close` are called from the training thread."""

    def __init__(
        self,
        metrics_log: MetricsLog,
        uploader: Uploader | None,
        notify: Callable[[str], None],
        *,
        flush_seconds: float,
        owned: Callable[[], bool],
    ) -> None:
        self._metrics_log = metrics_log
        self._uploader = uploader
        self._notify = notify
        self._flush_seconds = flush_seconds
        self._owned = owned
        self._complaints: set[str] = set()
        self._closed = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of an optimizer step. Takes microseconds and never raises; an error is reported once."""
        numbers: dict[str, float] = {}
        for name, value in metrics.items():
            try:
                numbers[name] = float(value)
            except Exception as error:  # of any kind: tracking must not end the run
                self._complain(f"metric {name!r} of step {step} is left out", error)
        try:
            if self._owned() and self._metrics_log.append(step, numbers) and self._uploader is not None:
                self._uploader.wake()
        except Exception as error:
            self._complain(f"metrics of step {step} are not written yet", error)

    def log_artifact(self, path: Path) -> None:
        """Queue a file or folder for upload; it is read when it is sent, and uploaded again when it has changed.

        Never raises. A path that does not exist yet is checked again every few seconds.
        """
        if self._uploader is not None:
            self._uploader.add_artifact(Path(path))

    def close(self, status: Status, cause: str = "") -> None:
        """Send what is left, and the status; after `tracking.flush_seconds` the rest is left to the next attempt.

        `cause` is why the attempt ended, if the attempt journal does not record it yet.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._metrics_log.close()
        except Exception as error:
            self._complain("the last metrics are lost", error)
        if self._uploader is not None:
            self._uploader.finish(status, cause, self._flush_seconds)

    def _complain(self, what: str, error: Exception) -> None:
        kind = type(error).__name__
        if kind not in self._complaints:
            self._complaints.add(kind)
            with contextlib.suppress(Exception):
                self._notify(f"{self._metrics_log.path}: {what} ({kind}: {error}); training continues")


class _MlflowRun:
    """The MLflow run that a `TrackingState` names: a `Destination`, used from the uploader's thread only."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        uri: str,
        state: TrackingState,
        tags: dict[str, str],
        say: Callable[[str], None],
    ) -> None:
        self._config, self._uri, self._state, self._tags, self._say = config, uri, state, tags, say
        self._run_dir = run_dir
        self._run_name = config.tracking.run_name or run_dir.absolute().name
        self._client: Any = None
        self._creation_unsure = False
        self._refused: set[str] = set()

    def open_client(self) -> None:
        from mlflow import MlflowClient

        database = sqlite_path(self._uri)
        with _tables_lock(database) if database else contextlib.nullcontext():
            self._client = MlflowClient(tracking_uri=self._uri)
            self._client.search_experiments(max_results=1)  # creates a new database's tables, under the lock

    def connect(self) -> None:
        self.open_client()
        run_id = self._known_run()
        if run_id is None:
            self._state.forget_run()
            run_id = self._create_run()
        if self._state.run_id != run_id:
            self._state.run_id = run_id
            self._state.save()
        self._client.update_run(run_id, status="RUNNING")
        self._describe_run(run_id)

    def log_points(self, points: list[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(_allowed_name(name), value, point.time_ms, point.step)
            for point in points
            for name, value in point.metrics.items()
        ]
        for start in range(0, len(metrics), _METRICS_PER_BATCH):
            self._log_metrics(metrics[start : start + _METRICS_PER_BATCH])

    def log_artifact(self, path: Path) -> None:
        self._client.log_artifact(self._state.run_id, str(path))

    def terminate(self, status: str, end_ms: int, cause: str) -> None:
        if cause:
            this = [a for a in read_attempts(self._run_dir) if a.number == self._state.attempt]
            for name, value in run_metadata.attempt_tags([replace(attempt, cause=cause) for attempt in this]).items():
                self._client.set_tag(self._state.run_id, name, value)
        self._client.set_terminated(self._state.run_id, status, end_ms)

    def lost_run(self, error: Exception) -> bool:
        return _code(error) == "RESOURCE_DOES_NOT_EXIST" or (_is_refusal(error) and self._run_is_deleted())

    def describe(self, error: Exception) -> str:
        return _reason(error)

    def _known_run(self) -> str | None:
        if self._state.run_id is None:
            return None
        try:
            run = self._client.get_run(self._state.run_id)
        except Exception as error:
            if _code(error) == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        if run.info.lifecycle_stage == "deleted":
            self._state.run_key = uuid.uuid4().hex  # deleted on purpose: continue in a new run
            return None
        return str(run.info.run_id)

    def _create_run(self) -> str:
        experiment_id = self._experiment_id()

        def search() -> str | None:
            mine = f"tags.`{_RUN_KEY_TAG}` = '{self._state.run_key}'"
            found = self._client.search_runs([experiment_id], mine, max_results=1)
            return str(found[0].info.run_id) if found else None

        run_id = search()
        if run_id is None and self._creation_unsure:
            # A request that timed out at a frozen server may still be executed when the server continues.
            time.sleep(1.0)
            run_id = search()
        if run_id is None:
            self._state.save()  # the key must be on disk before a run has it
            self._creation_unsure = True
            tags = {_RUN_KEY_TAG: self._state.run_key}
            created = self._client.create_run(experiment_id, self._state.started_ms, tags, self._run_name)
            run_id = str(created.info.run_id)
        self._creation_unsure = False
        return run_id

    def _experiment_id(self) -> str:
        name = self._config.tracking.experiment
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            database = sqlite_path(self._uri)  # a server itself decides where artifacts go
            location = artifacts_dir(database).as_uri() if database else None
            try:
                return str(self._client.create_experiment(name, artifact_location=location))
            except Exception as error:
                if _code(error) != "RESOURCE_ALREADY_EXISTS":
                    raise
            experiment = self._client.get_experiment_by_name(name)  # another run created it first
        if experiment.lifecycle_stage == "deleted":
            raise RuntimeError(f"experiment {name!r} is deleted there; restore it or set tracking.experiment")
        return str(experiment.experiment_id)

    def _describe_run(self, run_id: str) -> None:
        """Log new parameters, and tags. MLflow refuses a changed parameter, so a tag records the change."""
        from mlflow.entities import Param, RunTag

        data = self._client.get_run(run_id).data
        wanted = run_metadata.parameters(self._config)
        parameters = [Param(name, value) for name, value in wanted.items() if name not in data.params]
        tags = {"attempt": str(self._state.attempt), **run_metadata.placement_tags(self._config)}
        tags |= run_metadata.environment_tags() | run_metadata.attempt_tags(read_attempts(self._run_dir)) | self._tags
        if self._state.copied_from:
            tags["copied_from"] = self._state.copied_from
        changed = run_metadata.changed_parameters(data.params, wanted)
        if changed or "config.changed" in data.tags:
            tags["config.changed"] = changed
        entries = [
            RunTag(_allowed_name(key), str(value)[: run_metadata.TAG_CHARACTERS]) for key, value in tags.items()
        ]
        for start in range(0, len(parameters), _ENTRIES_PER_BATCH):
            self._client.log_batch(run_id, params=parameters[start : start + _ENTRIES_PER_BATCH])
        for start in range(0, len(entries), _ENTRIES_PER_BATCH):
            self._client.log_batch(run_id, tags=entries[start : start + _ENTRIES_PER_BATCH])

    def _log_metrics(self, metrics: list[Any]) -> None:
        try:
            self._client.log_batch(self._state.run_id, metrics=metrics)
        except Exception as error:
            if not _is_refusal(error) or self._run_is_deleted():
                raise
            # A metric that MLflow will never accept must not hold up all that follow.
            if len(metrics) > 1:
                middle = len(metrics) // 2
                self._log_metrics(metrics[:middle])
                self._log_metrics(metrics[middle:])
            elif metrics[0].key not in self._refused:
                self._refused.add(metrics[0].key)
                self._say(f"refuses metric {metrics[0].key!r} ({_reason(error)}); it stays in {METRICS_LOG}")

    def _run_is_deleted(self) -> bool:
        try:
            return bool(self._client.get_run(self._state.run_id).info.lifecycle_stage == "deleted")
        except Exception:
            return False


def _prepare_mlflow(uri: str, timeout_seconds: float) -> None:
    """Import mlflow here, not in the uploader: a data worker forked during the import would hang on its locks."""
    wanted = {
        # The client's own defaults block for minutes.
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(math.ceil(timeout_seconds)),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it would be printed into the live line
    }
    for name, value in wanted.items():
        if os.environ.get(name) == _set_by_us.get(name):  # the user's own setting stays
            os.environ[name] = _set_by_us[name] = value
    import mlflow

    if uri.startswith("http"):
        import mlflow.store.tracking.rest_store
    else:
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # "Creating initial MLflow database tables..."


def _allowed_name(name: str) -> str:
    """Return a name that MLflow accepts: letters and digits of any script, and `_-. :/`, at most 250 characters."""
    return re.sub(r"[^/\w.\- :]", "_", name)[:_NAME_CHARACTERS].strip("/ ") or "_"


def _code(error: Exception) -> str:
    return str(getattr(error, "error_code", ""))


def _is_refusal(error: Exception) -> bool:
    # MLflow's own error code. A bare HTTP 400 or 413 may come from a proxy and says nothing about the metrics.
    return _code(error) == "INVALID_PARAMETER_VALUE"


def _reason(error: Exception) -> str:
    """Return the cause in a few words, without passwords: MLflow's own messages span many lines."""
    text = without_password(" ".join(str(error).split()))
    if waited := re.search(r"timed out\W+read timeout=([\d.]+)", text):
        return f"timed out after {waited.group(1)} s"
    for pattern in (r"\[Errno -?\d+\] ([^'\")]+)", r"(timed out)", r"\(sqlite3\.\w+\) ([^\[(]+)"):
        if found := re.search(pattern, text):
            return found.group(1).strip()
    return f"{type(error).__name__}: {text[:200]}"


def _tables_lock(database: Path) -> AbstractContextManager[None]:
    """Let only one process at a time create the tables of a new SQLite file: MLflow fails when two do.

    If the lock cannot be taken, the tables are created without it; a retry resolves the rare conflict.
    """
    return file_lock(database.parent / f".{database.name}.lock", _LOCK_SECONDS)
