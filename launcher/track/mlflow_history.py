"""Read what MLflow has of runs: parameters, tags and the history of metrics."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biroute.configs.errors import UsageError
from biroute.configs.load import load_config
from biroute.configs.messages import without_password
from biroute.launcher.attempts.run_files import CONFIG, UPLOAD_STATE
from biroute.launcher.track.mlflow_client import open_client, prepare_mlflow, run_of_id
from biroute.launcher.track.mlflow_errors import code_of, explain
from biroute.launcher.track.upload_state import read_state
from biroute.launcher.track.uri import URI_VARIABLE, check_uri, sqlite_path, tracking_uri

_CALL_SECONDS = 60.0  # nothing else waits for the answers
_RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class RunHistory:
    """A run as MLflow has it."""

    run_id: str
    name: str
    status: str
    params: dict[str, str]
    tags: dict[str, str]
    steps: dict[int, dict[str, float]]  # step -> metric -> value, ascending; of a step that has several, the first
    first_ms: int  # times of the first and the last point, in milliseconds since 1970
    last_ms: int


def read_histories(runs: Sequence[str], uri: str | None, metrics: Sequence[str]) -> list[RunHistory]:
    """Read runs from MLflow; one that is named twice comes once.

    Args:
        runs: run folders, or ids of runs in MLflow.
        uri: the tracking URI; None: that of each run folder's configuration, and for ids MLFLOW_TRACKING_URI.
        metrics: names of the metrics whose history is read.

    Raises:
        UsageError: MLflow does not have a run or cannot be reached, or it is not known where an id is.
    """
    found: dict[tuple[str, str], RunHistory] = {}
    for run in runs:
        where, run_id = _locate(run, uri)
        if (where, run_id) not in found:
            found[where, run_id] = _read(run, where, run_id, metrics)
    return list(found.values())


def _locate(run: str, uri: str | None) -> tuple[str, str]:
    """Return the tracking URI and the id of a run."""
    folder = Path(run)
    if uri is not None:
        check_uri(uri, create=False, name="--uri")
    if folder.is_dir():
        try:
            run_id = read_state(folder / UPLOAD_STATE).run_id
        except (OSError, ValueError, TypeError):
            run_id = None
        if not run_id:
            raise UsageError(f"{run}: MLflow has no run of this folder; `biroute track sync {run}` sends it")
        if uri is None:
            uri = tracking_uri(load_config(folder / CONFIG), folder, create=False)
        return uri, run_id
    if not _RUN_ID.fullmatch(run):
        raise UsageError(f"{run}: neither a run folder nor the id of a run in MLflow (32 hexadecimal digits)")
    uri = uri or os.environ.get(URI_VARIABLE, "")
    if not uri:
        raise UsageError(f"{run}: no such run folder; if it is the id of a run in MLflow, name its store with --uri")
    check_uri(uri, create=False, name="--uri")
    return uri, run


def _read(named: str, uri: str, run_id: str, metrics: Sequence[str]) -> RunHistory:
    database, shown = sqlite_path(uri), without_password(uri)
    if database is not None and not database.exists():  # opening it would create it
        raise UsageError(f"{named}: {shown}: no such file; name the store of the run with --uri")
    prepare_mlflow(uri, _CALL_SECONDS)
    try:
        client = open_client(uri)
        run = run_of_id(client, run_id)
        if run.info.lifecycle_stage == "deleted":
            raise UsageError(f"{named}: run {run_id} is deleted in MLflow ({shown}); restore it there")
        return _history(client, run, metrics)
    except UsageError:
        raise
    except Exception as error:
        if code_of(error) == "RESOURCE_DOES_NOT_EXIST":
            raise UsageError(
                f"{named}: MLflow ({shown}) has no run {run_id}; name another store with --uri, or send the run with "
                "`biroute track sync`"
            ) from None
        raise UsageError(f"{named}: MLflow ({shown}): {explain(error, uri).reason}") from error


def _history(client: Any, run: Any, metrics: Sequence[str]) -> RunHistory:
    steps: dict[int, dict[str, float]] = {}
    times = [int(run.info.start_time or 0)]
    for name in metrics:
        if name not in run.data.metrics:
            continue
        points = client.get_metric_history(run.info.run_id, name)
        for point in sorted(points, key=lambda point: (point.step, point.timestamp)):
            steps.setdefault(point.step, {}).setdefault(name, point.value)
        times += [point.timestamp for point in points]
    return RunHistory(
        run_id=str(run.info.run_id),
        name=str(run.info.run_name or run.info.run_id),
        status=str(run.info.status),
        params=dict(run.data.params),
        tags=dict(run.data.tags),
        steps=dict(sorted(steps.items())),
        first_ms=min(times),
        last_ms=max(times),
    )
