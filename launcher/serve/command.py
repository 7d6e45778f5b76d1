"""The work of `biroute serve`: load the model, listen, and end on a signal."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from biroute.launcher.generate.model_choice import ModelChoice
from biroute.launcher.generate.trained import Say, open_trained
from biroute.launcher.serve.listener import LOOPBACK
from biroute.launcher.serve.metrics import Metrics
from biroute.launcher.serve.server import Server
from biroute.launcher.serve.service import Service
from biroute.launcher.serve.signals import end_signals
from biroute.launcher.serve.worker import Worker

_STOP_SECONDS = 30.0  # a prompt that is being read cannot be interrupted


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
    with end_signals() as asked:
        trained = open_trained(request.model, say)
        name = trained.checkpoint.resolve().parents[1].name
        metrics = Metrics()
        worker = Worker(trained.model, trained.tokenizer, request.max_batch, request.queue, metrics)
        server = Server(request.host, request.port, Service(name, worker, metrics))
        worker.start()
        server.start()
        _say_where(server, request, f"{name}, {trained.checkpoint}", say)
        asked.get()
        say("stopping: running texts end with what they have")
        worker.stop(_STOP_SECONDS)  # from now on requests are answered with 503
        sent = server.wait_for_answers()
        server.stop()
        say("stopped" if sent else "stopped; some clients did not take their answers in time")


def _say_where(server: Server, request: Request, what: str, say: Say) -> None:
    host = f"[{request.host}]" if ":" in request.host else request.host
    shown = socket.gethostname() if request.host in ("0.0.0.0", "::") else host
    say(f"serving {what} on http://{shown}:{server.port}/v1  (Ctrl-C stops it)")
    if request.host not in LOOPBACK:
        say(
            f"--host={request.host}: whoever reaches this address can use the model; there is no authentication and "
            "no encryption"
        )
