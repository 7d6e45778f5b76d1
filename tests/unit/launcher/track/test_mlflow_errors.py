"""What people are told of MLflow's errors: real ones, from a small server that answers like those that users met."""

from __future__ import annotations

import errno
import http.server
import sqlite3
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from biroute.configs.errors import UsageError
from biroute.launcher.track import mlflow_retry_after
from biroute.launcher.track.mlflow_client import keep_library_logs, open_client, prepare_mlflow
from biroute.launcher.track.mlflow_errors import Trouble, explain
from biroute.launcher.track.mlflow_history import read_histories


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers with the status that the first part of the path names, and a page for people, or JSON of its own."""

    def do_GET(self) -> None:
        first, asked = (*self.path.split("/")[1].split("+"), "")[:2]
        name, _, body = first.partition("-")
        if name == "slow":
            self.server.stopped.wait(10)  # type: ignore[attr-defined]
        self.send_response(int(name) if name.isdigit() else 200)
        if asked:
            seconds = time.time() + float(asked.removeprefix("date"))
            self.send_header("Retry-After", formatdate(seconds, usegmt=True) if "date" in asked else asked)
        self.end_headers()
        self.wfile.write({"json": b"{}", "says": b'{"message": "Forbidden"}'}.get(body, b"<html>Sign in</html>"))

    do_POST = do_GET  # noqa: N815  # the name that http.server calls

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    found.stopped = threading.Event()  # type: ignore[attr-defined]
    found.handle_error = lambda *_: None  # type: ignore[method-assign,assignment]  # of a client that is gone
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{found.server_port}"
    found.stopped.set()  # type: ignore[attr-defined]
    found.shutdown()


def trouble_at(uri: str, tmp_path: Path) -> Trouble:
    prepare_mlflow(uri, 1.0)
    keep_library_logs(tmp_path / "mlflow.log")
    with pytest.raises(Exception) as caught:  # noqa: PT011  # of any kind
        open_client(uri, anew=True)
    found = explain(caught.value, uri)
    assert "\n" not in found.reason and len(found.reason) <= 300
    return found


@pytest.mark.parametrize(
    ("uri", "words", "permanent"),
    [
        ("http://{}/401", "refuses the user or password (401); set MLFLOW_TRACKING_USERNAME and", True),
        ("http://{}/403", "refuses the user or password (403)", True),
        ("http://{}/401-json", "refuses the user or password (401)", True),
        ("http://{}/403-json", "refuses the user or password (403)", True),
        ("http://{}/403-says", "refuses the user or password (403)", True),
        ("http://{}/502-json", "answers 502", False),
        ("http://{}/404", "there is no MLflow at this address (404); correct the path", True),
        ("http://{}/413", "takes no file of this size (413)", True),
        ("http://{}/login", "something else than MLflow answers, such as a sign-in page", True),
        ("https://{}", "no TLS connection (WRONG_VERSION_NUMBER); if it speaks plain HTTP, write http://", True),
        ("http://{}/500", "answers 500", False),
        ("http://{}/503", "answers 503", False),
        ("http://{}/429", "answers 429", False),
        ("http://{}/slow", "timed out after 1 s", False),
        ("http://127.0.0.1:1", "Connection refused", False),
        ("http://no-such-host.invalid", "not known", False),
    ],
)
def test_what_a_server_answers(uri: str, words: str, permanent: bool, server: str, tmp_path: Path) -> None:
    found = trouble_at(uri.format(server), tmp_path)
    assert words in found.reason
    assert found.permanent == permanent
    assert found.timed_out == ("timed out" in words)


@contextmanager
def signed_by_itself(tmp_path: Path, address: str = "127.0.0.1", days: int = 1) -> Iterator[tuple[str, Path]]:
    """A server with TLS whose certificate no authority has signed, for an address and some days; uri, file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, address)])
    host = x509.SubjectAlternativeName([x509.IPAddress(IPv4Address(address))])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=9)).not_valid_after(now + timedelta(days=days))
    certificate = builder.add_extension(host, critical=False).sign(key, hashes.SHA256())
    pem, secret = tmp_path / "server.pem", tmp_path / "server.key"
    pem.write_bytes(certificate.public_bytes(Encoding.PEM))
    secret.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, secret)
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    found.socket = context.wrap_socket(found.socket, server_side=True)
    found.handle_error = lambda *_: None  # type: ignore[method-assign,assignment]
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"https://127.0.0.1:{found.server_port}", pem
    found.shutdown()
    found.server_close()


@pytest.fixture
def no_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "MLFLOW_TRACKING_SERVER_CERT_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_bundle")
def test_a_certificate_that_nobody_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cause is told first, and what is said to help does."""
    with signed_by_itself(tmp_path) as (uri, certificate):
        found = trouble_at(f"{uri}/401", tmp_path)
        assert found.reason.startswith("its certificate is not trusted (self-signed certificate); set ")
        assert found.permanent
        variable, what = found.reason.partition("; set ")[2].split(" to the ")
        assert what == "file of its authority"
        monkeypatch.setenv(variable, str(certificate))
        assert "refuses the user or password (401)" in trouble_at(f"{uri}/401", tmp_path).reason


@pytest.mark.usefixtures("no_bundle")
@pytest.mark.parametrize(
    ("address", "days", "words"),
    [
        ("127.0.0.1", -1, "(certificate has expired); it needs a new one"),
        ("127.0.0.2", 1, "write the name that it is for into tracking.uri, in the place of 127.0.0.1"),
    ],
)
def test_a_certificate_that_no_file_of_an_authority_helps(
    address: str, days: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with signed_by_itself(tmp_path, address, days) as (uri, certificate):
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate))
        found = trouble_at(uri, tmp_path)
    assert words in found.reason and "CERT_PATH" not in found.reason and found.permanent


@pytest.mark.usefixtures("no_bundle")
@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE"])
def test_a_file_of_authorities_that_is_not_there(
    name: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "/no where/ca.pem")
    found = trouble_at(f"https://{server}", tmp_path)
    assert found.reason == f"{name}=/no where/ca.pem: no such file or folder; correct it" and found.permanent


def test_what_says_nothing_to_everything_is_no_empty_run(server: str) -> None:
    with pytest.raises(UsageError, match="something else than MLflow answers; correct the address"):
        read_histories(["0" * 32], f"http://{server}/200-json", ["train/loss"])


@pytest.mark.parametrize(
    ("answer", "least", "most"),
    [("503+7", 6, 7), ("429+date30", 28, 30), ("503", 0, 0), ("500+9", 0, 0), ("503+99999", 599, 600)],
)
def test_how_long_a_server_wants_to_be_left_alone(
    answer: str, least: float, most: float, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_retry_after, "_left_alone_until", 0.0)
    trouble_at(f"http://{server}/{answer}", tmp_path)
    assert least <= mlflow_retry_after.seconds_to_wait() <= most


def test_a_proxy_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    reason = trouble_at("http://mlflow.example/x", tmp_path).reason
    assert "the proxy http://me:***@127.0.0.1:1 of HTTP_PROXY does not answer" in reason
    assert "NO_PROXY=mlflow.example" in reason


def test_a_variable_that_mlflow_cannot_use_is_named(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "perhaps")
    found = trouble_at(f"http://{server}/login", tmp_path)
    assert "environment variable MLFLOW_TRACKING_INSECURE_TLS" in found.reason and "perhaps" in found.reason
    assert found.permanent


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("0584bdc529eb", "made by an older version than MLflow"),
        ("f00dfeedbeef", "made by a newer version than MLflow"),
    ],
)
def test_a_database_of_another_version(version: str, words: str, mlflow_database: Path, tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_bytes(mlflow_database.read_bytes())
    with sqlite3.connect(path) as database:
        database.execute("UPDATE alembic_version SET version_num = ?", (version,))
    database.close()
    found = trouble_at(f"sqlite:///{path}", tmp_path)
    assert words in found.reason and found.permanent
    assert ("mlflow db upgrade" in found.reason) == ("older" in words)


def test_a_full_disk_of_ours_is_not_blamed_on_the_server() -> None:
    error = RuntimeError("while saving")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device", "/runs/x/tracking_state.json")
    found = explain(error, "http://server")
    assert found.reason == "/runs/x/tracking_state.json: No space left on device" and not found.permanent
