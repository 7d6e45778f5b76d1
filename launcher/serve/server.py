"""The server: it listens, gives each connection a thread, and stops cleanly."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from typing import Any

from biroute.configs.errors import UsageError
from biroute.launcher.serve.handler import Handler
from biroute.launcher.serve.service import Service

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MOST_CONNECTIONS = 512
_TOO_MANY = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 5\r\nContent-Length: 0\r\n\r\n"


class Server(ThreadingHTTPServer):
    """Serves one model.

    Attributes:
        service: what it answers with.
        local_only: it listens on this machine's own address only.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, host: str, port: int, service: Service) -> None:
        """Listen on `port` of `host`, 0 for any port.

        Raises:
            UsageError: that is not possible.
        """
        self.service, self.local_only = service, host in LOOPBACK
        self._answering = 0
        self._changed = threading.Condition()
        self._connections = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        try:
            self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            super().__init__((host, port), Handler)
        except OSError as error:
            raise UsageError(f"--host={host} --port={port}: {error.strerror}; choose another with --port") from None

    def server_bind(self) -> None:
        """Listen, without asking the network for this machine's name as the standard library does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection its thread, or refuse it where there are too many."""
        if self._connections.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        try:
            request.setblocking(False)
            request.send(_TOO_MANY)
        except OSError:
            pass
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection; the base class calls it in the connection's thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what is wrong, unless it is only that the client has gone."""
        import sys

        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Hold off the end of `wait_for_answers` for the time of the block."""
        with self._changed:
            self._answering += 1
        try:
            yield
        finally:
            with self._changed:
                self._answering -= 1
                self._changed.notify_all()

    def wait_for_answers(self, seconds: float) -> bool:
        """Wait until all answers have been sent; returns whether they were in time."""
        deadline = time.monotonic() + seconds
        with self._changed:
            return self._changed.wait_for(lambda: not self._answering, max(0.0, deadline - time.monotonic()))
