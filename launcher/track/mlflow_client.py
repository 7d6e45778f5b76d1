"""MLflow's client, set up for a training process: short time-outs, quiet, and opened anew when its database moved.

Only the files `mlflow_*.py` of this folder import mlflow, inside functions, to keep `biroute --help` fast.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from biroute.configs.errors import FencedError
from biroute.configs.files import append_file, file_lock
from biroute.launcher.track.mlflow_errors import MlflowStateError
from biroute.launcher.track.mlflow_retry_after import note_retry_after
from biroute.launcher.track.uri import sqlite_path

_LOCK_SECONDS = 20.0
_LOG_BYTES = 1 << 20  # of what the libraries say, kept twice
_LIBRARIES = ("mlflow", "sqlalchemy", "alembic", "urllib3")
_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_set_by_us: dict[str, str] = {}  # environment variables, so that the next tracker of this process may change them


def prepare_mlflow(uri: str, timeout_seconds: float) -> None:
    """Import mlflow now, not in a thread: a data worker forked during the import would hang on its locks."""
    wanted = {
        # The client's own defaults block for minutes.
        _TIMEOUT: str(math.ceil(timeout_seconds)),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it would be printed into the live line
    }
    for name, value in wanted.items():
        _set(name, value)
    import mlflow

    if uri.startswith("http"):
        import mlflow.store.tracking.rest_store

        note_retry_after()
    else:
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # "Creating initial MLflow database tables..."


def set_call_timeout(seconds: float) -> None:
    """Let calls wait so long for an answer, unless the user has set MLFLOW_HTTP_REQUEST_TIMEOUT."""
    # glibc replaces a variable that exists without moving the others, which a thread may be reading.
    _set(_TIMEOUT, str(math.ceil(seconds)))


def open_client(uri: str, *, anew: bool = False) -> Any:
    """Return a client of `uri` whose store answers; `anew` drops the connections that an earlier client kept."""
    from mlflow import MlflowClient

    database = sqlite_path(uri)
    with _tables_lock(database) if database else contextlib.nullcontext():
        if anew and not uri.startswith("http"):
            _forget_store(uri)
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)  # creates a new database's tables, under the lock
    return client


class OwnersClient:
    """A client that makes no call once another attempt owns the run: a lost node may move again at any time."""

    def __init__(self, client: Any, owned: Callable[[], bool]) -> None:
        self._client, self._owned = client, owned

    def __getattr__(self, name: str) -> Any:
        if not self._owned():
            raise FencedError(f"another attempt owns the run; {name} is not called")
        return getattr(self._client, name)


def run_of_id(client: Any, run_id: str) -> Any:
    """Return a run of MLflow.

    Raises:
        MlflowStateError: what answers is no MLflow: a page that says `{}` to everything would be an empty run.
    """
    run = client.get_run(run_id)
    if run.info.run_id != run_id:
        raise MlflowStateError("something else than MLflow answers; correct the address of the tracking URI")
    return run


def keep_library_logs(path: Path) -> None:
    """Send what MLflow, SQLAlchemy and urllib3 log to a file: an outage would fill the terminal with tracebacks."""
    handler: logging.Handler = logging.NullHandler()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        append_file(path).close()  # through the one door, which follows no link
        handler = logging.handlers.RotatingFileHandler(
            path, maxBytes=_LOG_BYTES, backupCount=1, encoding="utf-8", errors="replace"
        )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in _LIBRARIES:
        logger = logging.getLogger(name)
        for old in logger.handlers:
            old.close()
        logger.handlers, logger.propagate = [handler], False


def _set(name: str, value: str) -> None:
    if os.environ.get(name) == _set_by_us.get(name):  # the user's own setting stays
        os.environ[name] = _set_by_us[name] = value


def _forget_store(uri: str) -> None:
    """Close the pooled connections: those to a SQLite file that was moved or replaced would fail for ever."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from mlflow.tracking._tracking_service import utils

    engine = SqlAlchemyStore._engine_map.pop(uri, None)
    if engine is not None:
        engine.dispose()
    utils._tracking_store_registry._get_store_with_resolved_uri.cache_clear()


def _tables_lock(database: Path) -> AbstractContextManager[None]:
    """Let only one process at a time create the tables of a new SQLite file: MLflow fails when two do.

    If the lock cannot be taken, the tables are created without it; a retry resolves the rare conflict.
    """
    return file_lock(database.parent / f".{database.name}.lock", _LOCK_SECONDS)
