"""What surrounds the answer to every request: the check of its `Host`, its errors as JSON, and its count."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from biroute.launcher.serve.errors import ClientGoneError, RequestError, stopping
from biroute.launcher.serve.limits import Limits
from biroute.launcher.serve.metrics import Metrics

_PIECE_BYTES = 65_536
_LOCAL_NAMES = ("127.0.0.1", "localhost", "::1", None)


class Json(Response):
    """An answer in JSON. A long one goes in pieces, so that a client has some time for each."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the bytes of the content, or those that it is."""
        return content if isinstance(content, bytes) else json.dumps(content, ensure_ascii=False).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await self.send(send, more=False)

    async def send(self, send: Send, *, more: bool) -> None:
        """Send it, and end the response unless `more` is to come."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for begin in range(0, len(self.body), _PIECE_BYTES):
            end = begin + _PIECE_BYTES
            rest = more or end < len(self.body)
            await send({"type": "http.response.body", "body": self.body[begin:end], "more_body": rest})


class InFlight:
    """The number of requests that have come whole and are being answered."""

    def __init__(self) -> None:
        self._count = 0
        self._changed = threading.Condition()

    def add(self, count: int) -> None:
        """Count some more, or fewer."""
        with self._changed:
            self._count += count
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Wait, in another thread, until there is none; returns whether that was in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._count, seconds)


class _Exchange:
    """One request and its answer: how far they are."""

    def __init__(self, receive: Receive, send: Send, in_flight: InFlight) -> None:
        self._receive, self._send, self._in_flight = receive, send, in_flight
        self.status: int | None = None  # None until the answer begins
        self.whole = False  # the request has been read

    @contextmanager
    def counted(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._in_flight.add(-self.whole)

    async def receive(self) -> Message:
        message = await self._receive()
        if not self.whole and not message.get("more_body", False):  # its last part, or its client has gone
            self.whole = True
            self._in_flight.add(1)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)

    async def refuse(self, error: RequestError, drop_seconds: float) -> None:
        """Send an error, and read what is left of the request: closing while it comes would destroy the answer."""
        if self.status is not None:
            return
        headers = error.headers if self.whole else {"Connection": "close", **error.headers}
        await Json(error.body(), error.status, headers).send(self.send, more=True)
        with suppress(TimeoutError):
            async with asyncio.timeout(drop_seconds):
                while not self.whole:
                    await self.receive()
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})


class Guard:
    """ASGI middleware around the whole application.

    Attributes:
        in_flight: the requests that are being answered.
    """

    def __init__(
        self, app: ASGIApp, paths: Collection[str], metrics: Metrics, limits: Limits, *, local_only: bool
    ) -> None:
        """`paths` are counted by name, all others as one; `local_only`: refuse requests to another `Host`."""
        self.in_flight = InFlight()
        self._app, self._paths, self._metrics, self._limits = app, paths, metrics, limits
        self._local_only = local_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        began, path = time.monotonic(), _path(scope["path"])
        exchange = _Exchange(receive, send, self.in_flight)
        with exchange.counted():
            status = await self._answer({**scope, "path": path}, exchange)
        name = path if path in self._paths else "other"
        self._metrics.request(name, status, time.monotonic() - began)

    async def _answer(self, scope: Scope, exchange: _Exchange) -> int:
        try:
            if self._local_only:
                _check_host(Headers(scope=scope).get("Host", ""))
            await self._app(scope, exchange.receive, exchange.send)
        except ClientGoneError:
            return 499
        except RequestError as error:
            await exchange.refuse(error, self._limits.drop_seconds)
        except asyncio.CancelledError:  # the server ends, and this request did not come in time
            await exchange.refuse(stopping(), 0)
        except Exception:
            traceback.print_exc(file=sys.stderr)
            if exchange.status is not None:
                raise  # which cuts the connection: the client sees that its answer is not whole
            inside = RequestError("internal error; the server's output says more", status=500)
            await exchange.refuse(inside, self._limits.drop_seconds)
        return exchange.status or 499


def _path(target: str) -> str:
    """Return the path of a target that may be a whole address, as clients of proxies send it."""
    if target.startswith(("http://", "https://")):
        with suppress(ValueError):  # half a pair of brackets
            return urlsplit(target).path
    return target


def _check_host(host: str) -> None:
    """Refuse a page of another site that has its own name point to this machine."""
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        name = host
    if name not in _LOCAL_NAMES:
        raise RequestError(
            f"Host: {host} is not this machine; use 127.0.0.1, or start the server with --host", status=403
        )
