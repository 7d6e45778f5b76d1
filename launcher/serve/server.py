"""The server: uvicorn in a thread of its own, which stops cleanly."""

from __future__ import annotations

import threading
import time

import uvicorn

from biroute.launcher.serve.app import build_app
from biroute.launcher.serve.connection import bounded
from biroute.launcher.serve.limits import Limits
from biroute.launcher.serve.listener import LOOPBACK, bind
from biroute.launcher.serve.service import Service


class Server:
    """Serves one model.

    Attributes:
        service: what it answers with.
        port: that it listens on.
    """

    def __init__(self, host: str, port: int, service: Service, limits: Limits | None = None) -> None:
        """Listen on `port` of `host`, 0 for any port.

        Raises:
            UsageError: that is not possible.
        """
        self.service, self._limits = service, limits or Limits()
        self._listener = bind(host, port)
        self.port = int(self._listener.getsockname()[1])
        self._app = build_app(service, self._limits, local_only=host in LOOPBACK)
        self._uvicorn = uvicorn.Server(_config(self._app, self._limits, service))
        # In the main thread uvicorn would take the signals, too.
        self._thread = threading.Thread(target=self._uvicorn.run, args=[[self._listener]], name="http", daemon=True)

    def start(self) -> None:
        """Answer requests from now on."""
        self._thread.start()
        while not self._uvicorn.started and self._thread.is_alive():
            time.sleep(0.005)
        if not self._uvicorn.started:
            raise RuntimeError("the HTTP server did not start")

    def wait_for_answers(self, seconds: float | None = None) -> bool:
        """Wait until all requests that have come are answered; returns whether they were in time."""
        return self._app.in_flight.wait(self._limits.answer_seconds if seconds is None else seconds)

    def stop(self) -> None:
        """Close the port and all connections."""
        self._uvicorn.should_exit = True
        self._thread.join()


def _config(app: object, limits: Limits, service: Service) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=bounded(limits, service.metrics),
        loop="asyncio",
        ws="none",
        lifespan="off",
        interface="asgi3",
        workers=1,  # or uvicorn would read it from the environment
        # `/metrics` counts, and errors inside are printed where they are found.
        log_config=None,
        log_level="critical",
        access_log=False,
        # No header of a client says who or where it is.
        proxy_headers=False,
        root_path="",
        server_header=False,
        headers=[("server", "biroute")],
        h11_max_incomplete_event_size=limits.head_bytes,
        timeout_keep_alive=limits.idle_seconds,  # type: ignore[arg-type]  # any number does, and for the next one
        timeout_graceful_shutdown=limits.close_seconds,  # type: ignore[arg-type]
    )
