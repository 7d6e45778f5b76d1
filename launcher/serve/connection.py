"""One connection: uvicorn's, with the deadlines and bounds that uvicorn leaves to a proxy, and errors in JSON."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from biroute.launcher.serve.errors import RequestError
from biroute.launcher.serve.limits import Limits
from biroute.launcher.serve.metrics import Metrics

_LINGER_SECONDS = 2.0  # for which a refused connection is read on: closing at once would destroy the answer
_REFUSED_AT_A_TIME = 256


def bounded(limits: Limits, metrics: Metrics) -> type[Connection]:
    """Return the class of one server's connections."""
    return type("BoundedConnection", (Connection,), {"limits": limits, "metrics": metrics})


class Connection(H11Protocol):
    """Reads requests and writes answers of one client.

    Attributes:
        limits: what it may use up.
        metrics: where requests that are no HTTP are counted.
    """

    limits: Limits
    metrics: Metrics
    _deadline: asyncio.TimerHandle | None = None  # of a request that is not whole yet
    _stalled: asyncio.TimerHandle | None = None  # of bytes that the client does not take
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, or refuse to."""
        super().connection_made(transport)
        # What the kernel does not take at once counts as not taken; by itself it would take megabytes.
        transport.set_write_buffer_limits(high=0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.limits.unsent_bytes)
        if len(self.connections) > self.limits.connections + _REFUSED_AT_A_TIME:
            transport.abort()
        elif len(self.connections) > self.limits.connections:
            message = f"more than {self.limits.connections} connections; try again later"
            self.refuse(RequestError(message, status=503, headers={"Retry-After": "5"}))
        else:
            self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._clear_deadline()
        self._clear_stalled()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes. A request must be there soon, however few bytes at a time it comes in."""
        if self._refused:
            return
        super().data_received(data)
        # Without bytes of a next request it is uvicorn that closes an idle connection.
        begun = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if begun or self.conn.their_state is h11.SEND_BODY:
            self._expect_request()
        else:
            self._clear_deadline()

    def pause_writing(self) -> None:
        """Give the client some time to take what is written."""
        super().pause_writing()
        self._clear_stalled()
        self._stalled = self.loop.call_later(self.limits.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It has taken all."""
        self._clear_stalled()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP; uvicorn calls it while it handles h11's error, which says more."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        if status == 431 and b"\n" not in self.conn.trailing_data[0]:
            status = 414  # not even the first line has an end
        self.refuse(RequestError(str(error or msg)[:200], status=status))  # it quotes the line

    def refuse(self, error: RequestError) -> None:
        """Send an error and close, whatever has been received."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._clear_deadline()
        self.metrics.request("other", error.status, 0.0)
        if self.cycle is not None and not self.cycle.response_complete:
            # Whoever answers this request must neither write any more nor wait.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # an answer has begun: nothing can follow
            return
        data = json.dumps(error.body()).encode()
        headers = {"content-type": "application/json", "content-length": str(len(data)), "connection": "close"}
        reason = HTTPStatus(error.status).phrase
        response = h11.Response(
            status_code=error.status, headers=list({**headers, **error.headers}.items()), reason=reason
        )
        for event in (response, h11.Data(data=data), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.write_eof()
        self._deadline = self.loop.call_later(_LINGER_SECONDS, self.transport.abort)

    def _expect_request(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.limits.receive_seconds, self._too_slow)

    def _too_slow(self) -> None:
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self.transport.close()  # nothing has come at all
            return
        seconds = self.limits.receive_seconds
        self.refuse(RequestError(f"the request was not there whole after {seconds:g} s", status=408))

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None

    def _clear_stalled(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
        self._stalled = None
