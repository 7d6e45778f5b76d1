"""The work of `biroute serve`: load the model, listen, and end on a signal."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from biroute.launcher.generate.model_choice import ModelChoice
from biroute.launcher.generate.trained import Say, open_trained
from biroute.launcher.serve.metrics import Metrics
from biroute.launcher.serve.server import LOOPBACK, Server
from biroute.launcher.serve.service import Service
from biroute.launcher.serve.worker import Worker

_STOP_SECONDS = 30.0  # a prompt that is being read cannot be interrupted
_SEND_SECONDS = 10.0


@dataclass(frozen=True)
class Request:
    """What `biroute serve` was asked for; the fields are its options."""

    model: ModelChoice
    host: str
    port: int
    max_batch: int
    queue: int


def serve(request: Request, say: Say) -> None:
    """Serve a model until SIGTERM or Ctrl-C.

    Args:
        request: which model, where and how.
        say: called with a line about each thing that the user should know.

    Raises:
        UsageError: as in `open_trained` and `Server`.
    """
    stop = threading.Event()
    with _on_signals(stop.set):
        trained = open_trained(request.model, say)
        name = trained.checkpoint.resolve().parents[1].name
        metrics = Metrics()
        worker = Worker(trained.model, trained.tokenizer, request.max_batch, request.queue, metrics)
        server = Server(request.host, request.port, Service(name, worker, metrics))
        worker.start()
        listener = threading.Thread(target=server.serve_forever, name="listener", daemon=True)
        listener.start()
        _say_where(server, request, f"{name}, {trained.checkpoint}", say)
        stop.wait()
        say("stopping: running texts end with what they have")
        server.shutdown()
        server.server_close()
        worker.stop(_STOP_SECONDS)
        sent = server.wait_for_answers(_SEND_SECONDS)
        say("stopped" if sent else "stopped; some clients did not take their answers in time")


def _say_where(server: Server, request: Request, what: str, say: Say) -> None:
    host = f"[{request.host}]" if ":" in request.host else request.host
    shown = socket.gethostname() if request.host in ("0.0.0.0", "::") else host
    say(f"serving {what} on http://{shown}:{server.server_port}/v1  (Ctrl-C stops it)")
    if request.host not in LOOPBACK:
        say(
            f"--host={request.host}: whoever reaches this address can use the model; there is no authentication and "
            "no encryption"
        )


@contextmanager
def _on_signals(act: Callable[[], None]) -> Iterator[None]:
    """Call a function on SIGTERM and SIGINT for the time of the block."""
    before = {number: signal.signal(number, lambda *_: act()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
