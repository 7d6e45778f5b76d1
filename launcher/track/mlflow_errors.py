"""What an error of MLflow's client means: its innermost cause in a few words, and whether waiting can help."""

from __future__ import annotations

import os
import re
import ssl
import traceback
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, resources
from urllib.parse import urlsplit

from biroute.configs.messages import without_password

_LONGEST = 300  # characters of a cause that is shown
_CREDENTIALS = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
_BUNDLES = ("MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")  # files of authorities
_REFUSED_USER = ("UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED")


class MlflowStateError(RuntimeError):
    """MLflow holds the run in a state that only a person can mend."""


@dataclass(frozen=True)
class Trouble:
    """Why MLflow cannot be reached or refuses."""

    reason: str
    permanent: bool = False  # waiting does not help: something has to be changed
    timed_out: bool = False


def explain(error: Exception, uri: str) -> Trouble:
    """Explain an error of a call to the tracking URI `uri`, without passwords."""
    chain = list(_causes(error))
    trouble = _own_file(chain) or _schema(error) or _connection(chain, uri) or _answer(error) or _plain(error, chain)
    reason = without_password(" ".join(trouble.reason.split()))
    return Trouble(reason[:_LONGEST], trouble.permanent, trouble.timed_out)


def code_of(error: Exception) -> str:
    """Return MLflow's error code, such as RESOURCE_DOES_NOT_EXIST; "" if the error is not MLflow's."""
    return str(getattr(error, "error_code", ""))


def is_refusal(error: Exception) -> bool:
    """Return whether MLflow itself refuses the values; a bare HTTP 400 or 413 may come from a proxy."""
    return code_of(error) == "INVALID_PARAMETER_VALUE"


def http_status(error: Exception) -> int | None:
    """Return the HTTP status of an answer that was an error; None if there was no answer."""
    if found := re.search(r"failed with error code (\d{3})|\b([45]\d{2}) (?:Client|Server) Error", str(error)):
        return int(found[1] or found[2])
    if found := re.search(r"too many (\d{3}) error responses", str(error)):
        return int(found[1])
    return _dropped_status(error)


def _dropped_status(error: Exception) -> int | None:
    """Return the status of an answer that is JSON but not MLflow's, as a proxy's: MLflow's client drops it."""
    content = getattr(error, "json", None)
    if not isinstance(content, dict) or content.get("error_code"):
        return None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        status = getattr(frame.f_locals.get("response"), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and all that it wraps, innermost last; urllib3 wraps by `reason`, SQLAlchemy by `orig`."""
    waiting: list[object] = [error]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop(0)
        if not isinstance(one, BaseException) or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += [
            one.__cause__,
            one.__context__,
            getattr(one, "reason", None),
            getattr(one, "orig", None),
            *one.args,
        ]


def _own_file(chain: list[BaseException]) -> Trouble | None:
    """A file of the run folder, such as on a full disk: MLflow is not to blame."""
    for one in chain:
        if isinstance(one, OSError) and isinstance(one.filename, str | bytes) and one.strerror:
            return Trouble(f"{one.filename}: {one.strerror}")  # type: ignore[str-bytes-safe]
    return None


def _schema(error: Exception) -> Trouble | None:
    pattern = r"out-of-date database schema \(found version (\w+)|Can't locate revision identified by '(\w+)'"
    found = re.search(pattern, str(error))
    if found is None:
        return None
    installed = f"MLflow {metadata.version('mlflow')}"
    known = resources.files("mlflow.store.db_migrations.versions").iterdir()
    if any(file.name.startswith(found[1] or found[2]) for file in known):
        return Trouble(
            f"the database was made by an older version than {installed}; make a backup of it, then run `mlflow db "
            "upgrade URI`",
            permanent=True,
        )
    return Trouble(
        f"the database was made by a newer version than {installed}; install that one here", permanent=True
    )


def _connection(chain: list[BaseException], uri: str) -> Trouble | None:
    """What happened below HTTP."""
    names = [type(one).__name__ for one in chain]
    if "ProxyError" in names:
        return _proxy(uri)
    for one in chain:
        if isinstance(one, ssl.SSLCertVerificationError):
            return _certificate(one, uri)
        if isinstance(one, ssl.SSLError):
            return Trouble(
                f"no TLS connection ({one.reason}); if it speaks plain HTTP, write http://", permanent=True
            )
        if isinstance(one, ModuleNotFoundError):
            return Trouble(f"the Python package {one.name} is missing; install it", permanent=True)
        if missing := re.search(r"TLS CA certificate bundle, invalid path: (.+)$", str(one)):
            named = next((name for name in _BUNDLES if os.environ.get(name) == missing[1]), _BUNDLES[0])
            return Trouble(f"{named}={missing[1]}: no such file or folder; correct it", permanent=True)
    text = " ".join(map(str, chain))
    if waited := re.search(r"timed out\W+(?:read|connect) timeout=([\d.]+)", text):
        return Trouble(f"timed out after {waited[1]} s", timed_out=True)
    if any(name in ("Timeout", "ReadTimeout", "ConnectTimeout") for name in names):
        return Trouble("timed out", timed_out=True)
    for pattern in (r"\[Errno -?\d+\] ([^'\")]+)", r"\((?:sqlite3|psycopg\w*|pymysql|MySQLdb)[\w.]*\) ([^\[(]+)"):
        if found := re.search(pattern, text):
            return Trouble(found[1].strip())
    return None


def _certificate(error: ssl.SSLCertVerificationError, uri: str) -> Trouble:
    """Why a server's certificate is refused; the numbers are OpenSSL's (X509_V_ERR_*)."""
    if error.verify_code == 10:
        remedy = "it needs a new one, which whoever runs the server has to make"
    elif error.verify_code in (62, 64):
        remedy = f"write the name that it is for into tracking.uri, in the place of {urlsplit(uri).hostname}"
    else:
        remedy = "set MLFLOW_TRACKING_SERVER_CERT_PATH to the file of its authority"
    return Trouble(f"its certificate is not trusted ({error.verify_message}); {remedy}", permanent=True)


def _proxy(uri: str) -> Trouble:
    parts = urlsplit(uri)
    proxies = urllib.request.getproxies()
    named = next((name for name in (parts.scheme, "all") if name in proxies), parts.scheme)
    return Trouble(
        f"the proxy {proxies.get(named, '')} of {named.upper()}_PROXY does not answer; correct it, or set NO_PROXY="
        f"{parts.hostname} if the server is reached without one"
    )


def _answer(error: Exception) -> Trouble | None:
    """What the server, or something in front of it, answered."""
    status, text = http_status(error), str(error)
    if status in (401, 403) or code_of(error) in _REFUSED_USER:
        return Trouble(f"refuses the user or password ({status or code_of(error)}); {_CREDENTIALS}", permanent=True)
    if status == 404 and code_of(error) != "RESOURCE_DOES_NOT_EXIST":
        return Trouble("there is no MLflow at this address (404); correct the path in tracking.uri", permanent=True)
    if "not in a valid JSON format" in text:
        return Trouble(
            f"something else than MLflow answers, such as a sign-in page; correct tracking.uri, or {_CREDENTIALS}",
            permanent=True,
        )
    if status == 413:
        return Trouble("the server or its proxy takes no file of this size (413)", permanent=True)
    return Trouble(f"answers {status}") if status is not None else None


def _plain(error: Exception, chain: list[BaseException]) -> Trouble:
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, MlflowStateError):
        return Trouble(str(error), permanent=True)
    variable = next((found for one in chain if (found := re.search(r"\bMLFLOW_[A-Z_]+", str(one)))), None)
    if variable is not None and any(isinstance(one, ValueError) for one in chain):
        return Trouble(f"the environment variable {variable[0]} has a value that MLflow cannot use: {error}", True)
    return Trouble(text)
