"""Results of evaluations: in a log of their own in the run folder, and from there in the run's own MLflow run.

They do not go through the metrics log and its uploader, because these belong to the attempt that is training, perhaps
on another machine, while its checkpoints are evaluated. So evaluations have a second log of the same form. What it
holds is sent directly, as `biroute track sync` does, and how far that came is a tag of the MLflow run itself, set in
the same call as the points: neither two evaluations nor a database that was restored can lead to a point that comes
twice or never. The uploader's state is read, never written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from biroute.configs.errors import UsageError
from biroute.configs.files import file_lock
from biroute.configs.messages import without_password
from biroute.configs.schema import RunConfig
from biroute.launcher.attempts.run_files import EVALUATIONS_LOG, UPLOAD_STATE
from biroute.launcher.track.metrics_log import MetricsLog, read_points
from biroute.launcher.track.mlflow_client import open_client, prepare_mlflow, run_of_id
from biroute.launcher.track.mlflow_errors import explain
from biroute.launcher.track.mlflow_run import allowed_name
from biroute.launcher.track.upload_state import TrackingState, read_state
from biroute.launcher.track.uploader import next_batch
from biroute.launcher.track.uri import experiment_name, run_page, tracking_uri

_SENT_TAG = "biroute.sent_evaluation_bytes"
_LOCK, _LOCK_SECONDS = ".evaluations.lock", 600.0
_LATER = "results stay in"


def evaluated(run_dir: Path) -> dict[int, dict[str, float]]:
    """Return what the log of evaluations holds: step -> metrics; empty if there is none."""
    found: dict[int, dict[str, float]] = {}
    path = run_dir / EVALUATIONS_LOG
    for point in read_points(path) if path.exists() else []:
        found.setdefault(point.step, {}).update(point.metrics)
    return found


def record_evaluation(run_dir: Path, step: int, metrics: Mapping[str, float], say: Callable[[str], None]) -> None:
    """Append results to the log; what it holds of a step already is not written again, and said where it differs.

    Raises:
        OSError: the run folder cannot be written.
    """
    with file_lock(run_dir / _LOCK, _LOCK_SECONDS):
        known = evaluated(run_dir).get(step, {})
        changed = [name for name, value in metrics.items() if name in known and not _same(known[name], value)]
        log = MetricsLog(run_dir / EVALUATIONS_LOG)
        try:
            log.append(step, metrics)
        finally:
            log.close()
    if changed:
        name = changed[0]
        say(
            f"step {step} has {len(changed)} results of the same names and other values already, such as {name} "
            f"{known[name]:.6g}, now {metrics[name]:.6g}: the earlier ones stay; --name keeps both"
        )


def send_evaluations(run_dir: Path, config: RunConfig, timeout_seconds: float, say: Callable[[str], None]) -> int:
    """Send what MLflow lacks of the log of evaluations; where it is away, or its URI wrong, a line says so: no error.

    Args:
        run_dir: the run's folder.
        config: the run's configuration.
        timeout_seconds: of a call.
        say: called with one line where something is not sent, and with the page of the run where something is.

    Returns:
        The number of values that were sent.
    """
    if not config.tracking.enabled or not (run_dir / EVALUATIONS_LOG).exists():
        return 0
    try:
        uri = tracking_uri(config, run_dir)
    except UsageError as error:  # the results must be shown all the same
        say(f"{error}; {_LATER} {EVALUATIONS_LOG}")
        return 0
    state = _state_of(run_dir, uri, experiment_name(config), say)
    if state is None:
        return 0
    try:
        prepare_mlflow(uri, timeout_seconds)
        with file_lock(run_dir / _LOCK, _LOCK_SECONDS):
            client = open_client(uri)
            run = run_of_id(client, str(state.run_id))
            if run.info.lifecycle_stage == "deleted":
                say(f"MLflow run {state.run_id} is deleted; {_LATER} {EVALUATIONS_LOG}")
                return 0
            sent = _send(client, run, run_dir / EVALUATIONS_LOG)
    except Exception as error:
        say(
            f"MLflow ({without_password(uri)}): {explain(error, uri).reason}; {_LATER} {EVALUATIONS_LOG}, and the "
            "next evaluation or `biroute track sync` sends them"
        )
        return 0
    if sent:
        page = run_page(uri, str(run.info.experiment_id), str(state.run_id), run_dir)
        say(f"{sent} values sent to MLflow: {page}")
    return sent


def _state_of(run_dir: Path, uri: str, experiment: str, say: Callable[[str], None]) -> TrackingState | None:
    """Return the uploader's state if it tells the MLflow run of this folder."""
    try:
        state = read_state(run_dir / UPLOAD_STATE)
    except (OSError, ValueError, TypeError):
        state = None
    if state is None or not state.target:  # nothing was tracked so far
        say(f"{run_dir} has no MLflow run yet; {_LATER} {EVALUATIONS_LOG}")
        return None
    if state.run_id is None or state.target != f"{without_password(uri)} {experiment}":
        say(f"{run_dir}: its MLflow run is not at {without_password(uri)} {experiment}; {_LATER} {EVALUATIONS_LOG}")
        return None
    home = Path(state.home) if state.home else run_dir
    if home != run_dir.resolve() and home.exists():  # a copy: the MLflow run is the original's
        say(f"{run_dir} is a copy of {home} and has no MLflow run of its own; {_LATER} {EVALUATIONS_LOG}")
        return None
    return state


def _send(client: Any, run: Any, log: Path) -> int:
    from mlflow.entities import Metric, RunTag

    text = run.data.tags.get(_SENT_TAG, "0")
    begin = int(text) if text.isdecimal() else 0
    if begin > log.stat().st_size:  # the log was replaced
        begin = 0
    sent = 0
    while True:
        points, end = next_batch(log, begin, 500)
        if end == begin:
            return sent
        metrics = [
            Metric(allowed_name(name), value, point.time_ms, point.step)
            for point in points
            for name, value in point.metrics.items()
            if math.isfinite(value)
        ]
        for first in range(0, max(1, len(metrics)), 1000):  # MLflow's limit
            last = first + 1000 >= len(metrics)
            tags = [RunTag(_SENT_TAG, str(end))] if last else []
            client.log_batch(run.info.run_id, metrics=metrics[first : first + 1000], tags=tags)
        sent += len(metrics)
        begin = end


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-9)
