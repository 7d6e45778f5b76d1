"""Tracking of metrics, parameters and artifacts: kept in the run folder first, then uploaded to MLflow by a thread.

Training only appends lines to the metrics log, `metrics.jsonl`. The uploader follows that file and sends new points
with their original timestamps. It records in `tracking_state.json` how far it has got and in which MLflow run, so
whatever fails (server absent, killed or frozen; this process killed), the rest is sent later: by the next attempt, or
by `biroute track sync`. Sending a point twice is harmless: MLflow keeps one row for each key, timestamp, step and
value.

A resumed run continues the same MLflow run. The points of the steps that it repeats after its checkpoint are already
in the metrics log and are not written again: of each (step, metric) the first value stays.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from biroute.configs.errors import UsageError
from biroute.configs.load import load_config
from biroute.configs.messages import without_password
from biroute.configs.schema import RunConfig
from biroute.launcher.attempts.failures import first_failure, log_file
from biroute.launcher.attempts.journal import FencingToken
from biroute.launcher.attempts.run_files import CONFIG, METRICS_LOG, UPLOAD_STATE, log_dir
from biroute.launcher.track.metrics_log import MetricsLog
from biroute.launcher.track.mlflow_client import keep_library_logs, prepare_mlflow
from biroute.launcher.track.mlflow_run import MlflowRun
from biroute.launcher.track.upload_state import DatasetFacts, Status, TrackingState
from biroute.launcher.track.uploader import Uploader
from biroute.launcher.track.uri import experiment_name, sqlite_path, tracking_uri

LIBRARY_LOG = "mlflow.log"  # in an attempt's logs
NONFINITE = "train/nonfinite"
_LARGEST_LOG = 1 << 20  # bytes of a log that is uploaded


def open_tracker(
    config: RunConfig,
    run_dir: Path,
    *,
    tags: Mapping[str, str],
    headline: str = "",
    datasets: Mapping[str, DatasetFacts] | None = None,
    notify: Callable[[str], None] | None = None,
    fencing_token: FencingToken | None = None,
) -> Tracker:
    """Open the tracker of a run, on rank 0. With `tracking.enabled=false` nothing is sent.

    The first call in a process takes some seconds, to import mlflow and create a new SQLite file; it does not wait
    for a server.

    Args:
        config: of the run.
        run_dir: the run folder.
        tags: added to those that are found automatically, such as the layout and the world size.
        headline: what is trained, one line, for the description of the run.
        datasets: what is trained on, by context, such as "train".
        notify: called with the few messages for people (where the run is, server lost, server back), also from
            another thread; by default they are logged.
        fencing_token: if given, nothing is written or sent once another attempt owns the folder.

    Raises:
        UsageError: the URI is malformed or of an unsupported scheme, or `run_dir` cannot be written.
    """
    owned = fencing_token.holds if fencing_token else lambda: True
    notify = notify or logging.getLogger(__name__).warning
    # Checked first, so that a bad URI leaves nothing behind.
    uri = tracking_uri(config, run_dir) if config.tracking.enabled else None
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        metrics_log = MetricsLog(run_dir / METRICS_LOG)
        # What describes the run is kept even where it is not tracked, for a later `biroute track sync`.
        target = f"{without_password(uri)} {experiment_name(config)}" if uri is not None else ""
        state = TrackingState.load(run_dir / UPLOAD_STATE, target, metrics_log.size_bytes, notify)
        state.owned = owned
        state.attempt = fencing_token.attempt if fencing_token else state.attempt + 1
        state.tags, state.headline = dict(tags) or state.tags, headline or state.headline
        state.datasets = dict(datasets or {}) or state.datasets
        state.save()
    except OSError as error:
        reason = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
        raise UsageError(f"train.run_dir={run_dir}: {reason}; use a writable folder") from None
    if uri is None:
        return Tracker(metrics_log, None, notify, flush_seconds=0.0, owned=owned)
    uploader = _start_uploader(config, run_dir, uri, state, notify)
    return Tracker(metrics_log, uploader, notify, flush_seconds=_flush_seconds(config), owned=owned)


def _start_uploader(
    config: RunConfig,
    run_dir: Path,
    uri: str,
    state: TrackingState,
    notify: Callable[[str], None],
) -> Uploader:
    prepare_mlflow(uri, config.tracking.timeout_seconds)
    keep_library_logs(log_dir(run_dir, state.attempt) / LIBRARY_LOG)
    say = _with_address(uri, notify)
    if "MLFLOW_RUN_ID" in os.environ:
        say("MLFLOW_RUN_ID is set and not used: each run folder has an MLflow run of its own")
    destination = MlflowRun(config, run_dir, uri, state, say)
    if sqlite_path(uri) is not None:
        # Creating the tables triggers a garbage collection of up to half a second, during which no thread runs:
        # better now than in the middle of a step. If it fails, the uploader tries again.
        with contextlib.suppress(Exception):
            destination.open_client()
    metrics_log_path, timeout = run_dir / METRICS_LOG, config.tracking.timeout_seconds
    uploader = Uploader(metrics_log_path, state, destination, say, timeout_seconds=timeout)
    uploader.start()
    return uploader


def close_after_crash(fencing_token: FencingToken) -> None:
    """Report the end of an attempt and its cause to MLflow if the attempt itself could not. Never raises."""
    run_dir = fencing_token.run_dir
    try:
        config = load_config(run_dir / CONFIG)
        if fencing_token.holds() and config.tracking.enabled and (run_dir / UPLOAD_STATE).exists():
            tracker = open_tracker(config, run_dir, tags={}, notify=lambda _: None, fencing_token=fencing_token)
            for path in _about_failure(log_dir(run_dir, fencing_token.attempt)):
                tracker.log_artifact(path)
            tracker.close("FAILED")
    except Exception as error:
        logging.getLogger(__name__).warning("the end of the run could not be reported to MLflow: %s", error)


def _about_failure(logs: Path) -> list[Path]:
    """Return the records of an attempt that failed, and the log of the rank that failed first unless it is large."""
    found = [logs / "failures"]
    if (first := first_failure(logs)) is not None:
        log = log_file(logs, first.rank)
        with contextlib.suppress(OSError):
            found += [log] if log.stat().st_size <= _LARGEST_LOG else []
    return [path for path in found if path.exists()]


def _with_address(uri: str, notify: Callable[[str], None]) -> Callable[[str], None]:
    def say(text: str) -> None:
        with contextlib.suppress(Exception):  # the terminal may be gone
            notify(f"MLflow ({without_password(uri)}): {text}")

    return say


def _flush_seconds(config: RunConfig) -> float:
    """Return how long the end may wait: where a job is about to be ended, saving has the larger share of its time."""
    limit = config.slurm.signal_seconds / 4 if "SLURM_JOB_ID" in os.environ else math.inf
    return min(config.tracking.flush_seconds, limit)


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
        if nonfinite := sum(not math.isfinite(value) for value in numbers.values()):
            numbers[NONFINITE] = float(nonfinite)  # a curve with a gap tells nothing
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

    def log_checkpoint(self) -> None:
        """Show the run's checkpoints in MLflow soon: a new one was saved. Never raises."""
        if self._uploader is not None:
            self._uploader.look_for_checkpoints()

    def close(self, status: Status, cause: str = "") -> None:
        """Send what is left, and the status; what is not sent after `tracking.flush_seconds` waits, which is said.

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
            self._uploader.finish((status, time.time_ns() // 1_000_000, cause), self._flush_seconds)

    def _complain(self, what: str, error: Exception) -> None:
        kind = type(error).__name__
        if kind not in self._complaints:
            self._complaints.add(kind)
            with contextlib.suppress(Exception):
                self._notify(f"{self._metrics_log.path}: {what} ({kind}: {error}); training continues")
