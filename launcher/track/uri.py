"""Where the runs of a configuration are tracked, checked before training and without importing mlflow."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from biroute.configs.errors import UsageError
from biroute.configs.files import try_writing
from biroute.configs.messages import without_password
from biroute.configs.schema import RunConfig

DATABASE_NAME = "mlflow.db"
ARTIFACTS_NAME = "mlartifacts"
URI_VARIABLE, EXPERIMENT_VARIABLE = "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"  # MLflow's own
_DEFAULT_EXPERIMENT = "biroute"
_EXPERIMENT_CHARACTERS = 256  # of a name in MLflow's database
# Database -> its default driver: name of the Python package and of its module.
_DATABASES = {
    "sqlite": ("", ""),
    "postgresql": ("psycopg2-binary", "psycopg2"),
    "mysql": ("mysqlclient", "MySQLdb"),
    "mssql": ("pyodbc", "pyodbc"),
}
_DRIVERS = {"psycopg2": ("psycopg2-binary", "psycopg2"), "mysqldb": ("mysqlclient", "MySQLdb")}
_REMEDY = "use http://HOST:PORT, sqlite:////ABSOLUTE/PATH/mlflow.db, or leave tracking.uri empty"
_SQLITE_MAGIC = b"SQLite format 3\x00"


def tracking_uri(config: RunConfig, run_dir: Path, *, create: bool = True) -> str:
    """Return the MLflow tracking URI of a run.

    That is `tracking.uri`, or else MLflow's own variable, or else mlflow.db in the parent of the run folder. With
    `create`, the folder of an SQLite file is made.

    Raises:
        UsageError: malformed URI, unsupported scheme, a file that is not an SQLite database, or a folder that its URI
            cannot name.
    """
    folder = run_dir.absolute().parent
    given, name = config.tracking.uri, "tracking.uri"
    if not given:
        given, name = os.environ.get(URI_VARIABLE, ""), URI_VARIABLE
    if not given and config.tracking.enabled and (odd := re.search(r"[?%]", str(folder))):
        raise UsageError(
            f"train.run_dir={run_dir}: {DATABASE_NAME} would be in {folder}, but {odd.group()!r} has a meaning in "
            "its URI; choose another folder, or set tracking.uri"
        )
    uri = given or f"sqlite:///{folder / DATABASE_NAME}"
    check_uri(uri, create=create, name=name if given else "tracking.uri")
    return uri


def experiment_name(config: RunConfig) -> str:
    """Return the experiment of a run: `tracking.experiment`, or else MLflow's own variable, or else "biroute".

    Raises:
        UsageError: the name is too long for MLflow's database.
    """
    name = config.tracking.experiment or os.environ.get(EXPERIMENT_VARIABLE, "") or _DEFAULT_EXPERIMENT
    if len(name) > _EXPERIMENT_CHARACTERS:
        raise UsageError(
            f"the MLflow experiment {name[:30]!r}... has {len(name)} characters, its database holds "
            f"{_EXPERIMENT_CHARACTERS}; shorten tracking.experiment or {EXPERIMENT_VARIABLE}"
        )
    return name


def run_page(uri: str, experiment_id: str, run_id: str, run_dir: Path) -> str:
    """Return where people see a run: the address of its page on a server, or the command that shows it."""
    if not uri.startswith("http"):
        return f"`biroute ui {run_dir}/config.yaml` shows it"
    parts = urlsplit(uri)
    base = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
    return f"{base}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def check_uri(uri: str, *, create: bool = True, name: str = "tracking.uri") -> None:
    """Refuse a URI that could never work; whether a server answers is not checked.

    Args:
        uri: the tracking URI.
        create: make the folder of an SQLite file.
        name: the field or variable that the URI comes from.

    Raises:
        UsageError: malformed URI, unsupported scheme, a file that is not an SQLite database, or a database whose
            driver is not installed.
    """
    shown = f"{name}={without_password(uri)}"
    if uri.startswith(("databricks", "uc:")):
        raise UsageError(f"{shown}: Databricks is not supported; {_REMEDY}")
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
    else:
        _check_driver(scheme, shown)


def sqlite_path(uri: str) -> Path | None:
    """Return the absolute path of an SQLite URI's file; None for any other URI."""
    scheme, _, rest = uri.partition("://")
    if not scheme.startswith("sqlite") or len(rest) < 2:
        return None
    # Three slashes: relative to the working folder; four: absolute.
    return Path(rest[1:].partition("?")[0]).absolute()


def absolute_uri(uri: str, base: Path) -> str:
    """Return the URI of an SQLite file so that it does not depend on the working folder; any other URI as it is."""
    scheme, _, rest = uri.partition("://")
    if not scheme.startswith("sqlite") or not rest.startswith("/") or rest.startswith("//"):
        return uri
    return f"{scheme}:///{base.absolute() / rest[1:]}"


def artifacts_dir(database: Path) -> Path:
    """Return the folder for the artifacts of the runs in an SQLite file."""
    return database.parent / ARTIFACTS_NAME


def _check_http(uri: str, shown: str) -> None:
    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname, parts.port  # both are parsed, and may raise, on access
    except ValueError as error:
        raise UsageError(f"{shown}: {error}; {_REMEDY}") from None
    if parts.fragment or uri.endswith("#"):
        raise UsageError(f"{shown}: this is the address of a page; use the part before the #")
    if not host or re.search(r"\s", uri):
        raise UsageError(f"{shown}: {'it has no host' if not host else 'it contains blanks'}; {_REMEDY}")


def _check_driver(scheme: str, shown: str) -> None:
    database, _, driver = scheme.partition("+")
    package, module = _DRIVERS.get(driver, (driver, driver)) if driver else _DATABASES[database]
    if importlib.util.find_spec(module) is None:
        raise UsageError(f"{shown}: its driver is not installed; `pip install {package}`, or {_REMEDY}")


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
        if create:
            _check_writable(path, shown)
    except OSError as error:
        raise UsageError(f"{shown}: {error.strerror}: {error.filename}; name a file in a writable folder") from None


def _check_writable(path: Path, shown: str) -> None:
    """Try it now: MLflow would do so for minutes."""
    try:
        if path.exists():
            path.open("r+b").close()
        else:
            try_writing(path.parent)
    except OSError:
        raise UsageError(f"{shown}: {path} cannot be written; name a file in a writable folder") from None
