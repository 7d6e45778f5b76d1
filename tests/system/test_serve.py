"""`biroute serve` as a process: its port, its signals, and what it says."""

from __future__ import annotations

import json
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
    with server(trained, "--port", port, "--max-batch", 1) as (process, lines):
        assert f"serving run, {trained}/checkpoints/step-00000002 on http://127.0.0.1:{port}/v1" in lines[-1]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:
            assert json.load(answer)["data"][0]["id"] == "run"
        again = command("serve", trained, "--port", port)
        assert (again.status, again.err) == (2, f"error: port {port} is in use; choose another with --port\n")
        body = json.dumps({"prompt": "Return the", "max_tokens": 50, "stream": True, "stop": ["\0"]}).encode()
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            answer = connection.recv(65536)  # it has begun
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            while piece := connection.recv(65536):
                answer += piece
        assert process.wait(60) == 0 and time.monotonic() - began < 30
        assert process.stderr is not None
        assert process.stderr.read() == "stopping: running texts end with what they have\nstopped\n"
    assert answer.startswith(b"HTTP/1.1 200") and answer.rstrip().endswith(b"0")
    # The signal may come behind the last token, however many of them there were.
    assert any(b'"finish_reason": "%s"' % reason in answer for reason in (b"abort", b"length", b"stop"))
    assert b"data: [DONE]" in answer


def test_it_says_when_others_can_reach_it_and_ctrl_c_stops_it(trained: Path) -> None:
    port = claim_port()
    with server(trained, "--port", port, "--host", "0.0.0.0") as (process, _):
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("--host=0.0.0.0: whoever reaches this address can use the model; there is no auth")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
