"""HTTP: one thread for each connection, which asks the worker and writes what it says."""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from queue import Empty
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote, urlsplit

from biroute.launcher.serve.answers import Answers
from biroute.launcher.serve.bodies import Wanted, chat_completion, completion, detokenize, tokenize
from biroute.launcher.serve.errors import RequestError
from biroute.launcher.serve.metrics import CONTENT_TYPE
from biroute.launcher.serve.worker import Event, Order

if TYPE_CHECKING:
    from biroute.launcher.serve.server import Server

_MOST_BODY_BYTES = 16 * 2**20
_IDLE_SECONDS = 60.0  # of a connection on which nothing comes, or of a client that reads nothing
_POLL_SECONDS = 0.1  # how soon a client that has gone is noticed
_MODELS = "/v1/models/"
_BODIES: dict[str, Callable[[bytes], Wanted]] = {
    "/v1/completions": completion,
    "/v1/chat/completions": chat_completion,
}
_TOKENIZER = ("/tokenize", "/detokenize")  # vLLM's: lm-eval asks them for the tokens of its texts
_POSTED = (*_BODIES, *_TOKENIZER)
_PAGES = ("/v1/models", "/tokenizer_info", "/health", "/metrics")


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"
    server_version = "biroute"
    sys_version = ""
    timeout = _IDLE_SECONDS
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Answer what needs no model."""
        self._answer(self._page)

    def do_POST(self) -> None:
        """Answer completions."""
        self._answer(self._complete)

    do_HEAD = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_GET  # noqa: N815

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that is no HTTP; the standard library would send a page of HTML."""
        self.close_connection = True
        self.request_version = self.protocol_version  # what the client speaks is not known
        self._began = time.monotonic()
        self._path = "other"
        self._send_error(RequestError(message or "bad request", status=code))

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: `/metrics` counts."""

    @property
    def _server(self) -> Server:
        return cast("Server", self.server)

    def _answer(self, work: Callable[[], None]) -> None:
        self._began = time.monotonic()
        path = urlsplit(self.path).path
        self._path = path if path in (*_POSTED, *_PAGES) else "other"
        self._sent = False
        with self._server.answering():
            try:
                work()
            except RequestError as error:
                # A body that has not been read would be taken for the next request.
                self.close_connection = True
                self._send_error(error)
            except (ClientGoneError, OSError):
                self.close_connection = True
                self._server.service.metrics.request(self._path, 499, time.monotonic() - self._began)

    def _check_host(self) -> None:
        """Refuse a page of another site that has its own name point to this machine."""
        host = self.headers.get("Host", "")
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            name = host
        if self._server.local_only and name not in ("127.0.0.1", "localhost", "::1", None):
            raise RequestError(
                f"Host: {host} is not this machine; use 127.0.0.1, or start the server with --host", status=403
            )

    def _page(self) -> None:
        self._check_host()
        service, path = self._server.service, unquote(urlsplit(self.path).path)
        if path in _POSTED:
            raise RequestError(f"{path} takes POST, not {self.command}", status=405, headers={"Allow": "POST"})
        if self.command != "GET" and (path in _PAGES or path.startswith(_MODELS)):
            raise RequestError(f"{path} takes GET, not {self.command}", status=405, headers={"Allow": "GET"})
        if path == "/v1/models":
            self._send_json(service.models())
        elif path.startswith(_MODELS):
            self._send_json(service.model(path.removeprefix(_MODELS)))
        elif path == "/tokenizer_info":
            self._send_json(service.tokenizer_info())
        elif path == "/health":
            alive = service.worker.alive
            self._send_json({"status": "ok" if alive else "stopping"}, 200 if alive else 503)
        elif path == "/metrics":
            self._send(200, service.metrics.as_text().encode(), CONTENT_TYPE)
        else:
            raise _nothing_at(path)

    def _complete(self) -> None:
        # First of all: an answer that is sent while a body waits to be read may never arrive.
        path, data = urlsplit(self.path).path, self._body()
        self._check_host()
        if path in _PAGES or path.startswith(_MODELS):
            raise RequestError(f"{path} takes GET, not POST", status=405, headers={"Allow": "GET"})
        if path not in _POSTED:
            raise _nothing_at(path)
        service = self._server.service
        if path == "/tokenize":
            self._send_json(service.tokenize(*tokenize(data)))
            return
        if path == "/detokenize":
            self._send_json(service.detokenize(*detokenize(data)))
            return
        wanted = _BODIES[path](data)
        order = Order(service.texts(wanted))
        answers = Answers(wanted, order.texts, service.tokenizer, service.name)
        service.worker.submit(order)
        try:
            if wanted.stream:
                self._stream(order, answers, wanted)
            else:
                self._send_json(answers.whole(list(self._events(order))))
        except BaseException:
            service.worker.cancel(order)
            raise

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit()):
            raise RequestError("give the size of the body: Content-Length", status=411)
        if len(length) > 12 or int(length) > _MOST_BODY_BYTES:
            raise RequestError(f"the body has {length[:20]} bytes; send at most {_MOST_BODY_BYTES}", status=413)
        data = self.rfile.read(int(length))
        if len(data) < int(length):
            raise ClientGoneError
        return data

    def _events(self, order: Order) -> Iterator[Event]:
        """Yield all events of an order.

        Raises:
            RequestError: a text failed.
            ClientGoneError: the client closed the connection.
        """
        left = len(order.texts)
        while left:
            try:
                event = order.events.get(timeout=_POLL_SECONDS)
            except Empty:
                self._check_client()
                continue
            if event.error is not None:
                raise event.error
            left -= event.reason is not None
            yield event

    def _check_client(self) -> None:
        """Raise ClientGoneError if the connection has been closed."""
        poll = select.poll()  # select() takes no file number above 1,023
        poll.register(self.connection, select.POLLIN)
        if poll.poll(0) and not self.connection.recv(1, socket.MSG_PEEK):
            raise ClientGoneError

    def _stream(self, order: Order, answers: Answers, wanted: Wanted) -> None:
        """Send server-sent events; the headers go with the first, so that an early error has a status of its own."""
        for event in self._events_of_stream(order):
            if isinstance(event, RequestError):
                self._send_event(event.body())
                break
            chunk = answers.chunk(event)
            self._check_client()
            if chunk is not None:
                self._send_event(chunk)
        else:
            if wanted.include_usage:
                self._send_event(answers.usage_chunk())
            self._send_event("[DONE]")
        self._write_chunk(b"")
        self._count(200)

    def _events_of_stream(self, order: Order) -> Iterator[Event | RequestError]:
        """Yield events, and an error that comes when the stream has begun, which ends it."""
        try:
            yield from self._events(order)
        except RequestError as error:
            if not self._sent:
                raise
            self._server.service.worker.cancel(order)
            yield error

    def _send_event(self, content: dict[str, Any] | str) -> None:
        if not self._sent:
            self._headers(200, "text/event-stream; charset=utf-8", {"Cache-Control": "no-cache"})
            chunked = self.request_version != "HTTP/1.0"
            self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Connection", "close")))
            self.end_headers()
        data = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        self._write_chunk(f"data: {data}\n\n".encode())

    def _write_chunk(self, data: bytes) -> None:
        if self.request_version == "HTTP/1.0":
            self.wfile.write(data)
        else:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _send_json(self, content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(content, ensure_ascii=False).encode(), "application/json", headers)

    def _send_error(self, error: RequestError) -> None:
        try:
            self._send_json(error.body(), error.status, {"Connection": "close", **error.headers})
        except OSError:
            self._count(499)

    def _send(self, status: int, data: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self._headers(status, kind, {"Content-Length": str(len(data)), **(headers or {})})
        self.end_headers()
        if getattr(self, "command", None) != "HEAD":
            self.wfile.write(data)
        self._count(status)

    def _headers(self, status: int, kind: str, headers: dict[str, str]) -> None:
        self._sent = True
        self.send_response(status)
        for name, value in {"Content-Type": kind, **headers}.items():
            self.send_header(name, value)

    def _count(self, status: int) -> None:
        self._server.service.metrics.request(self._path, status, time.monotonic() - self._began)


def _nothing_at(path: str) -> RequestError:
    known = ", ".join((*_POSTED, *_PAGES))
    return RequestError(f"there is nothing at {path[:80]}; use {known}", status=404)
