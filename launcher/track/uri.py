"""The tracking URI of a run, checked before training and without importing mlflow."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

from biroute.configs.errors import UsageError
from biroute.configs.messages import without_password
from biroute.configs.schema import RunConfig

DATABASE_NAME = "mlflow.db"
ARTIFACTS_NAME = "mlartifacts"
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_REMEDY = "use http://HOST:PORT, sqlite:////ABSOLUTE/PATH/mlflow.db, or leave tracking.uri empty"
_SQLITE_MAGIC = b"SQLite format 3\x00"


def tracking_uri(config: RunConfig, run_dir: Path, *, create: bool = True) -> str:
    """Return the MLflow tracking URI of a run: `tracking.uri`, or mlflow.db in the parent of the run folder.

    With `create`, the folder of an SQLite file is made.

    Raises:
        UsageError: malformed URI, unsupported scheme, a file that is not an SQLite database, or a folder that its URI
            cannot name.
    """
    folder = run_dir.absolute().parent
    if not config.tracking.uri and config.tracking.enabled and (odd := re.search(r"[?%]", str(folder))):
        raise UsageError(
            f"train.run_dir={run_dir}: {DATABASE_NAME} would be in {folder}, but {odd.group()!r} has a meaning in "
            "its URI; choose another folder, or set tracking.uri"
        )
    uri = config.tracking.uri or f"sqlite:///{folder / DATABASE_NAME}"
    check_uri(uri, create=create)
    return uri


def check_uri(uri: str, *, create: bool = True) -> None:
    """Refuse a URI that could never work; whether a server answers is not checked.

    Raises:
        UsageError: malformed URI, unsupported scheme, or a file that is not an SQLite database.
    """
    shown = f"tracking.uri={without_password(uri)}"
    scheme, separator, _ = uri.partition("://")
    if not separator:
        near = f"; did you mean http://{uri}?" if re.fullmatch(r"[\w.-]+:\d+(/\S*)?", uri) else ""
        kind = "a folder or file path" if not near else "an address without a scheme"
        raise UsageError(f"{shown}: {kind}, which MLflow does not accept{near or '; ' + _REMEDY}")
    if scheme in ("http", "https"):
        _check_http(uri, shown)
    elif scheme.partition("+")[0] not in _DATABASES:
        raise UsageError(f"{shown}: unsupported scheme {scheme!r}; {_REMEDY}")
    elif scheme.startswith("sqlite"):
        _check_sqlite(uri, shown, create)


def sqlite_path(uri: str) -> Path | None:
    """Return the absolute path of an SQLite URI's file; None for any other URI."""
    scheme, _, rest = uri.partition("://")
    if not scheme.startswith("sqlite") or len(rest) < 2:
        return None
    # Three slashes: relative to the working folder; four: absolute.
    return Path(rest[1:].partition("?")[0]).absolute()


def artifacts_dir(database: Path) -> Path:
    """Return the folder for the artifacts of the runs in an SQLite file."""
    return database.parent / ARTIFACTS_NAME


def _check_http(uri: str, shown: str) -> None:
    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname, parts.port  # both are parsed, and may raise, on access
    except ValueError as error:
        raise UsageError(f"{shown}: {error}; {_REMEDY}") from None
    if not host or re.search(r"\s", uri):
        raise UsageError(f"{shown}: {'it has no host' if not host else 'it contains blanks'}; {_REMEDY}")


def _check_sqlite(uri: str, shown: str, create: bool) -> None:
    path = sqlite_path(uri)
    if path is None or not uri.partition("://")[2].startswith("/") or path.is_dir():
        raise UsageError(f"{shown}: names no file; {_REMEDY}")
    try:
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with path.open("rb") as file:
                start = file.read(len(_SQLITE_MAGIC))
            if start and start != _SQLITE_MAGIC:
                raise UsageError(f"{shown}: {path} is not an SQLite file; move it away or name another file")
    except OSError as error:
        raise UsageError(f"{shown}: {error.strerror}: {error.filename}; name a file in a writable folder") from None
