"""A small model served in this process, and requests to it by hand."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPMessage
from typing import Any

from biroute.launcher.serve.limits import Limits
from biroute.launcher.serve.metrics import Metrics
from biroute.launcher.serve.server import Server
from biroute.launcher.serve.service import Service
from biroute.launcher.serve.worker import Worker
from helpers.cached import VOCABULARY, cached_model, tiny_config

EOS_ID = 256


class ByteTokenizer:
    """Token n is the byte n, 256 ends a document."""

    vocab_size, eos_id = VOCABULARY, EOS_ID

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode_bytes(self, ids: Any) -> bytes:
        return b"".join(bytes([n]) if n < 256 else b"" for n in ids)

    def decode(self, ids: Any) -> str:
        return self.decode_bytes(ids).decode(errors="replace")


class Gate:
    """Lets a model make steps one by one, once it is closed."""

    def __init__(self) -> None:
        self._open, self._steps = threading.Event(), threading.Semaphore(0)
        self._open.set()

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()
        self._steps.release(1000)

    def wait(self) -> None:
        if not self._open.is_set():
            self._steps.acquire(timeout=20)


class Served:
    """A server that runs."""

    def __init__(self, server: Server, worker: Worker, gate: Gate) -> None:
        self.server, self.worker, self.gate, self.port = server, worker, gate, server.port

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, HTTPMessage]:
        """Status, body (of JSON its content) and headers."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, data, headers)
        answer = connection.getresponse()
        content: Any = answer.read().decode()
        if "json" in answer.headers["Content-Type"]:
            content = json.loads(content) if content else None
        connection.close()
        return answer.status, content, answer.headers

    def complete(self, **body: Any) -> Any:
        status, content, _ = self.ask("POST", "/v1/completions", body)
        assert status == 200, content
        return content

    def metric(self, name: str) -> int:
        _, text, _ = self.ask("GET", "/metrics")
        return int(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{name} ")))

    def raw(self, data: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(data)
        return connection


def post(body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    """A request as bytes."""
    data = json.dumps(body).encode()
    return b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (path.encode(), len(data), data)


def response(connection: socket.socket) -> tuple[bytes, bytes]:
    """Head and body of the next response, whether or not the connection is closed behind it."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _more(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(re.search(rb"content-length: (\d+)", head.lower())[1])  # type: ignore[index]
    while len(body) < length:
        body += _more(connection)
    assert len(body) == length
    return head, body


def _more(connection: socket.socket) -> bytes:
    data = connection.recv(65536)
    assert data, "the connection was closed"
    return data


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for something that must become true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.02)


@contextmanager
def served(max_batch: int = 4, queue: int = 8, limits: Limits | None = None) -> Iterator[Served]:
    model, gate, metrics = cached_model(tiny_config({"sequence_length": 96})), Gate(), Metrics()
    step = model.step

    def gated(*arguments: Any) -> Any:
        gate.wait()
        return step(*arguments)

    model.step = gated  # type: ignore[method-assign]
    worker = Worker(model, ByteTokenizer(), max_batch, queue, metrics)  # type: ignore[arg-type]
    server = Server("127.0.0.1", 0, Service("tiny", worker, metrics), limits)
    worker.start()
    server.start()
    try:
        yield Served(server, worker, gate)
    finally:
        gate.open()
        worker.stop(20)
        server.stop()
