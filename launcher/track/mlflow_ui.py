"""`biroute ui`: serves MLflow's web interface for a tracking database, with settings that suit one machine."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType

from biroute.configs.errors import UsageError
from biroute.configs.messages import without_password
from biroute.launcher.track.uri import absolute_uri, artifacts_dir, check_uri, sqlite_path

_START_SECONDS = 120.0  # about ten are usual; a busy machine needs longer
_STOP_SECONDS = 10.0
_STOPS = (signal.SIGTERM, signal.SIGHUP)
_OUTPUT_BYTES = 4000  # of the server's, shown if it fails
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_OTHER_MACHINES = (
    "MLflow answers 403 to host names that it does not know: from your own machine use `ssh -L "
    "{port}:127.0.0.1:{port} {host}` and open the address above, or set MLFLOW_SERVER_ALLOWED_HOSTS"
)


def serve_ui(uri: str, port: int, host: str = "127.0.0.1") -> None:
    """Serve the runs of the tracking URI `uri` until interrupted, and print the address of the training view.

    Raises:
        UsageError: `uri` cannot be served, or the port is in use or not permitted.
        RuntimeError: the server did not start, or it ended; its messages are on the terminal.
    """
    command = server_command(uri, port, host)
    check_port(host, port)
    with (
        tempfile.TemporaryFile() as output,  # what the server says matters only if it fails
        # uvicorn, which MLflow starts, imports from the current folder first, whatever Python is told: an empty one.
        tempfile.TemporaryDirectory(prefix="biroute-ui-") as empty,
    ):
        # In its own session, so that Ctrl-C reaches only this process, which then stops all processes of the server.
        server = subprocess.Popen(
            command, env=server_environment(uri), cwd=empty, start_new_session=True, stdout=output, stderr=output
        )
        # SIGHUP as well: when the terminal goes away, the server in its own session would stay, and keep the port.
        handled = [number for number in _STOPS if signal.getsignal(number) != signal.SIG_IGN]
        previous = {number: signal.signal(number, _interrupt) for number in handled}
        try:
            _wait_until_up(server, host, port)
            print(f"MLflow: {training_view(host, port)}  (Ctrl-C stops it)", flush=True)
            if host not in _LOOPBACK:
                print(_OTHER_MACHINES.format(port=port, host=socket.gethostname()), flush=True)
            status = server.wait()
            raise RuntimeError(f"the MLflow server ended unexpectedly with status {status}")
        except KeyboardInterrupt:
            with contextlib.suppress(OSError):  # the terminal is gone
                print("MLflow stopped", flush=True)
        except RuntimeError:
            output.seek(0)
            print(output.read()[-_OUTPUT_BYTES:].decode(errors="replace"), file=sys.stderr)
            raise
        finally:
            stop_server(server)
            for number, handler in previous.items():
                signal.signal(number, handler)


def server_command(uri: str, port: int, host: str = "127.0.0.1") -> list[str]:
    """Return the command that serves `uri`, which the environment names, with one worker.

    Raises:
        UsageError: `uri` is already a server, or its database does not exist.
    """
    check_uri(uri, create=False)
    if uri.startswith("http"):
        raise UsageError(f"tracking.uri={without_password(uri)} is a server already; open it in a browser")
    command = [sys.executable, "-P", "-m", "mlflow", "server"]
    database = sqlite_path(uri)
    if database is not None:
        if not database.is_file():
            raise UsageError(
                f"{database}: no MLflow database there yet; train a run first, or set tracking.uri to that of another"
            )
        command += ["--artifacts-destination", artifacts_dir(database).as_uri()]
    return [*command, "--host", host, "--port", str(port), "--workers", "1"]


def server_environment(uri: str) -> dict[str, str]:
    """Return this process's environment, with what is served and without the features that training does not use."""
    # Job execution alone starts a dozen processes and takes over 2 GB.
    light = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    # Not on the command line, which everybody on the machine can read: the URI may hold a password.
    return light | dict(os.environ) | {"MLFLOW_BACKEND_STORE_URI": absolute_uri(uri, Path.cwd())}


def check_port(host: str, port: int) -> None:
    """Check that a server can listen on `port` of `host`.

    Raises:
        UsageError: it cannot.
    """
    if not 0 < port < 65536:
        raise UsageError(f"port {port} is out of range; choose one from 1024 to 65535 with --port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UsageError(f"host {host!r}: {error.strerror}; use 127.0.0.1 or 0.0.0.0 with --host") from None
    with socket.socket(family, kind, protocol) as probe:
        # As servers do, so that a port in TIME_WAIT after a restart counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except PermissionError:
            raise UsageError(f"port {port} needs root; choose one above 1023 with --port") from None
        except OSError as error:
            if error.errno == 98 or "in use" in str(error):
                raise UsageError(f"port {port} is in use; choose another with --port") from None
            raise UsageError(f"host {host!r}: {error.strerror}; use 127.0.0.1 or 0.0.0.0 with --host") from None


def training_view(host: str, port: int) -> str:
    """Return the address of the experiments page in the view for training; MLflow's default is the one for GenAI."""
    shown = "127.0.0.1" if host in ("0.0.0.0", "") else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/#/experiments?workflowType=machine_learning"


def stop_server(server: subprocess.Popen[bytes]) -> None:
    """Stop the server and its workers (one process group): SIGTERM first, then SIGKILL."""
    for number, seconds in ((signal.SIGTERM, _STOP_SECONDS), (signal.SIGKILL, _STOP_SECONDS)):
        try:
            os.killpg(server.pid, number)
            server.wait(seconds)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue


def _wait_until_up(server: subprocess.Popen[bytes], host: str, port: int) -> None:
    deadline = time.monotonic() + _START_SECONDS
    address = training_view(host, port).split("/#")[0] + "/health"
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the MLflow server did not start (status {server.returncode}); see its output above")
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the MLflow server did not answer within {_START_SECONDS:g} s")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
