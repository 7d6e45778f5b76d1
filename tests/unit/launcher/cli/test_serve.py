"""`biroute serve`: what is refused before a model is loaded."""

from __future__ import annotations

import socket
import sys

import pytest
from typer.testing import CliRunner

from biroute.configs.errors import UsageError
from biroute.launcher.cli.serve import serve_app


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-batch", "0"], "--max-batch=0 is out of range; use at least 1"),
        (["--queue", "-1"], "--queue=-1 is out of range; use at least 0"),
        (["--precision", "fp8"], "--precision=fp8 is unknown; use fp32 or bf16"),
        (["--port", "65536"], "port 65536 is out of range"),
        (["--port", "0", "--host", "no such host"], "--host=no such host --port=0: "),
        (["--host", "no such host"], "host 'no such host': "),
    ],
)
def test_bad_input_is_a_usage_error(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(serve_app, ["no-run", *arguments])
    assert isinstance(done.exception, UsageError) and message in str(done.exception)


def test_a_port_in_use_is_said_before_the_run_is_looked_at() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(serve_app, ["no-run", "--port", str(port)])
    assert str(done.exception) == f"port {port} is in use; choose another with --port"


def test_a_missing_extra_is_named_before_the_run_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # what Python then takes for not installed
    done = CliRunner().invoke(serve_app, ["no-run"])
    message = "biroute serve needs uvicorn, not installed here; install it with `pip install 'biroute[serve]'`"
    assert isinstance(done.exception, UsageError) and str(done.exception) == message
