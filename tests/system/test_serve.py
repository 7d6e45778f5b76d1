"""`biroute serve` as a process: its port, its signals, and what it says."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.ports import claim_port


@contextmanager
def server(run: Path, *options: object) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """The process, once it serves, and the lines that it has said by then."""
    program = [sys.executable, "-m", "biroute.launcher.cli.main", "serve", str(run), *map(str, options)]
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True) as process:
        watchdog = threading.Timer(120, process.kill)
        watchdog.start()
        try:
            assert process.stderr is not None
            lines: list[str] = []
            while not (lines and lines[-1].startswith("serving ")):
                line = process.stderr.readline()
                assert line, lines
                lines.append(line)
            yield process, lines
        finally:
            watchdog.cancel()
            process.kill()


def test_it_serves_until_a_signal_and_running_texts_end_with_what_they_have(
    trained: Path, command: Callable[..., Any]
) -> None:
    port = claim_port()
    with server(trained, "--port", port, "--max-batch", 2) as (process, lines):
        assert f"serving run, {trained}/checkpoints/step-00000002 on http://127.0.0.1:{port}/v1" in lines[-1]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:
            assert json.load(answer)["data"][0]["id"] == "run"
        again = command("serve", trained, "--port", port)
        assert (again.status, again.err) == (2, f"error: port {port} is in use; choose another with --port\n")
        with asked(port, b"no HTTP\r\n\r\n") as connection:  # of which the terminal shows nothing
            assert connection.recv(65536).startswith(b"HTTP/1.1 400")
        body = json.dumps({"prompt": "Return the", "max_tokens": 50, "stream": True, "stop": ["\0"]}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        streams = [asked(port, head.encode() + body) for _ in range(3)]
        answers = [stream.recv(65536) for stream in streams]  # they have begun
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        for number, stream in enumerate(streams):
            while piece := stream.recv(65536):
                answers[number] += piece
            stream.close()
        assert process.wait(60) == 0 and time.monotonic() - began < 30
        assert process.stderr is not None
        assert process.stderr.read() == "stopping: running texts end with what they have\nstopped\n"
    for whole in answers:
        assert whole.startswith(b"HTTP/1.1 200") and whole.endswith(b"\r\n0\r\n\r\n")
        # The signal may come behind the last token, however many of them there were.
        assert any(b'"finish_reason": "%s"' % reason in whole for reason in (b"abort", b"length", b"stop"))
        assert b"data: [DONE]" in whole


def asked(port: int, request: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall(request)
    return connection


def test_it_says_when_others_can_reach_it_on_a_free_port_and_ctrl_c_stops_it(trained: Path) -> None:
    host = "::" if has_ipv6() else "0.0.0.0"
    with server(trained, "--port", 0, "--host", host) as (process, lines):
        found = re.search(rf"http://{socket.gethostname()}:(\d+)/v1", lines[-1])
        assert found is not None
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith(f"--host={host}: whoever reaches this address can use the model; there is no auth")
        with urllib.request.urlopen(f"http://{'[::1]' if has_ipv6() else '127.0.0.1'}:{found[1]}/health") as answer:
            assert json.load(answer) == {"status": "ok"}
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True
