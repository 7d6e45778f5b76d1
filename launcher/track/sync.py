"""Send to MLflow what a run that no longer trains has in its folder (`biroute track sync`). No torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from biroute.configs.errors import EXIT_OK, EXIT_STOPPED, UsageError
from biroute.configs.files import file_lock
from biroute.configs.load import load_config
from biroute.configs.messages import without_password
from biroute.configs.schema import RunConfig
from biroute.launcher.attempts.failures import seconds_since_heartbeat
from biroute.launcher.attempts.journal import NO_END, Attempt, read_attempts
from biroute.launcher.attempts.run_files import (
    CONFIG,
    LOGS,
    LOSS_PLOT,
    METRICS_LOG,
    SYNC_LOCK,
    TOKENIZER,
    UPLOAD_STATE,
    log_dir,
    shown_config,
)
from biroute.launcher.track.artifact_uploader import send_artifacts
from biroute.launcher.track.evaluations import send_evaluations
from biroute.launcher.track.mlflow_client import keep_library_logs, prepare_mlflow
from biroute.launcher.track.mlflow_run import MlflowRun
from biroute.launcher.track.upload_state import End, Status, TrackingState
from biroute.launcher.track.uploader import send_points, values_after
from biroute.launcher.track.uri import experiment_name, tracking_uri

_CALL_SECONDS = 60.0  # nothing else waits for the answers
_ALIVE_SECONDS = 120.0  # since a heartbeat; ranks write one every few seconds
_LOCK_SECONDS = 2.0


@dataclass(frozen=True)
class Synced:
    """What was sent, and where people see the run."""

    values: int
    files: int
    page: str


def sync_run(run_dir: Path, say: Callable[[str], None]) -> Synced:
    """Send what MLflow lacks of a run: points, files, description and end. To be repeated as often as one likes.

    Raises:
        UsageError: the folder holds no run, the run is still training or is not tracked, or MLflow cannot be reached.
    """
    config, log = load_config(run_dir / CONFIG), run_dir / METRICS_LOG
    if run_dir.stat().st_uid != os.geteuid():
        raise UsageError(f"{run_dir} belongs to somebody else, who alone may send what it holds")
    if not log.exists():
        raise UsageError(f"{run_dir} has no {METRICS_LOG}; name the folder of a run that has trained")
    if not config.tracking.enabled:
        raise UsageError(f"{run_dir}: tracking.enabled is off; switch it on in {run_dir / CONFIG}")
    attempts = read_attempts(run_dir)
    if is_training(run_dir, attempts):
        raise UsageError(f"{run_dir}: attempt {attempts[-1].number} is training and sends its points itself")
    try:
        with file_lock(run_dir / SYNC_LOCK, _LOCK_SECONDS, required=True):
            return _sync(config, run_dir, attempts, say)
    except TimeoutError:
        raise UsageError(f"{run_dir}: another `biroute track sync` of it is under way; wait for its end") from None
    except OSError as error:
        raise UsageError(
            f"{error.filename or run_dir}: {error.strerror or error}; the run folder must be one that can be written"
        ) from None


def _sync(config: RunConfig, run_dir: Path, attempts: list[Attempt], say: Callable[[str], None]) -> Synced:
    log, uri = run_dir / METRICS_LOG, tracking_uri(config, run_dir)
    target = f"{without_password(uri)} {experiment_name(config)}"
    state = TrackingState.load(run_dir / UPLOAD_STATE, target, log.stat().st_size, say)
    for path in _files_of_runs(run_dir, attempts):
        state.artifacts.setdefault(path, "")
    prepare_mlflow(uri, max(_CALL_SECONDS, config.tracking.timeout_seconds))
    keep_library_logs(run_dir / LOGS / "mlflow-sync.log")
    run = MlflowRun(config, run_dir, uri, state, say, training=False)
    try:
        run.connect()
        values = sum(send_points(log, state, run))
        files = send_artifacts(run_dir.absolute(), state, run, say)
        end = state.end or _end_of(attempts)
        values += send_evaluations(run_dir, config, _CALL_SECONDS, say)
        run.update_note(end[2] if end is not None else "")
        if end is not None:
            run.terminate(*end)
        state.end = None
        state.save()
    except OSError as error:
        if isinstance(error.filename, str):  # a file of ours, of which MLflow knows nothing
            raise
        raise UsageError(_failed(run_dir, uri, run, state, error)) from error
    except Exception as error:
        raise UsageError(_failed(run_dir, uri, run, state, error)) from error
    return Synced(values, files, run.page)


def _failed(run_dir: Path, uri: str, run: MlflowRun, state: TrackingState, error: Exception) -> str:
    waiting = values_after(run_dir / METRICS_LOG, state.sent_bytes)
    reason = f"MLflow ({without_password(uri)}): {run.explain(error).reason}"
    return f"{run_dir}: {reason}; {waiting} values wait: run the same command again"


def _files_of_runs(run_dir: Path, attempts: list[Attempt]) -> list[str]:
    """Return the files that training would have sent, from the run folder, whether they are there or not."""
    shown = [shown_config(Path(), attempt.number) for attempt in attempts[-1:]]
    return [str(path) for path in (Path(TOKENIZER), Path(LOSS_PLOT), *shown)]


def is_training(run_dir: Path, attempts: list[Attempt]) -> bool:
    """Return whether the last attempt has not ended and its ranks give signs of life."""
    if not attempts or attempts[-1].ended is not None:
        return False
    silent = seconds_since_heartbeat(log_dir(run_dir, attempts[-1].number))
    return (time.time() - attempts[-1].began if silent is None else silent) < _ALIVE_SECONDS


def _end_of(attempts: list[Attempt]) -> End | None:
    """Return the end that the journal tells, for an attempt that was killed before it could report any."""
    if not attempts:
        return None
    last = attempts[-1]
    if last.ended is None:
        return "FAILED", time.time_ns() // 1_000_000, NO_END
    known: dict[int | None, Status] = {EXIT_OK: "FINISHED", EXIT_STOPPED: "KILLED"}
    status: Status = known.get(last.status, "FAILED")
    return status, int(1000 * last.ended), last.cause
