"""The application: which path answers with what."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from biroute.launcher.serve.answers import Answers
from biroute.launcher.serve.bodies import Wanted, chat_completion, completion, detokenize, tokenize
from biroute.launcher.serve.delivery import Delivery
from biroute.launcher.serve.errors import ClientGoneError, RequestError, stopping
from biroute.launcher.serve.guard import Guard, Json
from biroute.launcher.serve.limits import Limits
from biroute.launcher.serve.metrics import CONTENT_TYPE
from biroute.launcher.serve.service import Service
from biroute.launcher.serve.worker import Event, Text

_SHORT_BYTES = 65_536  # of a body that is read at once; a longer one must not hold up other clients
_SHORT_EVENTS = 256
_COMPLETIONS: dict[str, Callable[[bytes], Wanted]] = {
    "/v1/completions": completion,
    "/v1/chat/completions": chat_completion,
}
_T = TypeVar("_T")


def build_app(service: Service, limits: Limits, *, local_only: bool) -> Guard:
    """Return the ASGI application that serves one model; `local_only` as in `Guard`."""
    pages: dict[str, Callable[[Request], Response]] = {
        "/v1/models": lambda _: Json(service.models()),
        "/tokenizer_info": lambda _: Json(service.tokenizer_info()),
        "/health": lambda _: _health(service),
        "/metrics": lambda _: Response(service.metrics.as_text(), media_type=CONTENT_TYPE),
    }
    posted: dict[str, ASGIApp] = {
        **{path: _Completions(service, read, limits) for path, read in _COMPLETIONS.items()},
        # vLLM's: lm-eval asks them for the tokens of its texts.
        "/tokenize": _Posted(lambda data: service.tokenize(*tokenize(data)), limits),
        "/detokenize": _Posted(lambda data: service.detokenize(*detokenize(data)), limits),
    }
    paths = [*posted, *pages]
    routes = [Route(path, app) for path, app in posted.items()]
    routes += [Route(path, _Page(page)) for path, page in pages.items()]
    one_model = _Page(lambda request: Json(service.model(request.path_params["name"])))
    routes.append(Route("/v1/models/{name:path}", one_model))

    async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
        raise RequestError(f"there is nothing at {scope['path'][:80]}; use {', '.join(paths)}", status=404)

    router = Router(routes, redirect_slashes=False, default=nothing)
    return Guard(router, paths, service.metrics, limits, local_only=local_only)


def _health(service: Service) -> Json:
    alive = service.worker.alive
    return Json({"status": "ok" if alive else "stopping"}, 200 if alive else 503)


class _Page:
    """What needs no body and no model; an ASGI application of its own, as starlette would let GET stand for HEAD."""

    def __init__(self, work: Callable[[Request], Response]) -> None:
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        _check_method(scope, "GET")
        await self._work(Request(scope))(scope, receive, send)


class _Posted:
    """An answer to a body that needs no model."""

    def __init__(self, work: Callable[[bytes], dict[str, Any]], limits: Limits) -> None:
        self._work, self._limits = work, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        _check_method(scope, "POST")
        data = await _body(scope, receive, self._limits.body_bytes)
        answer = await _apart(len(data) > _SHORT_BYTES, lambda: Json(self._work(data)))
        await answer(scope, receive, send)


class _Completions:
    """Completions of one form: texts that the worker continues."""

    def __init__(self, service: Service, read: Callable[[bytes], Wanted], limits: Limits) -> None:
        self._service, self._read, self._limits = service, read, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        _check_method(scope, "POST")
        wanted, texts = await self._texts(scope, receive)
        service = self._service
        answers = Answers(wanted, texts, service.tokenizer, service.name)
        async with Delivery(
            service.worker, texts, receive, stream=wanted.stream, most_behind=self._limits.events_behind
        ) as delivery:
            if wanted.stream:
                await _Stream(answers, wanted, send).send(delivery)
                return
            events = [event async for event in delivery.events()]
        long = len(events) > _SHORT_EVENTS or any(len(event.tokens) > _SHORT_EVENTS for event in events)
        whole = await _apart(long, lambda: Json(answers.whole(events)))
        await whole(scope, receive, send)

    async def _texts(self, scope: Scope, receive: Receive) -> tuple[Wanted, list[Text]]:
        data = await _body(scope, receive, self._limits.body_bytes)

        def work() -> tuple[Wanted, list[Text]]:
            wanted = self._read(data)
            return wanted, self._service.texts(wanted)

        return await _apart(len(data) > _SHORT_BYTES, work)


class _Stream:
    """Server-sent events; the headers go with the first, so that an early error has a status of its own."""

    def __init__(self, answers: Answers, wanted: Wanted, send: Send) -> None:
        self._answers, self._wanted, self._send = answers, wanted, send
        self._begun = False

    async def send(self, delivery: Delivery) -> None:
        try:
            async for event in delivery.events():
                await self._news(event)
        except (RequestError, asyncio.CancelledError) as error:
            if not self._begun:
                raise
            # Cancelled: the server ends, and the model did not come to an end in time.
            await self._event((error if isinstance(error, RequestError) else stopping()).body())
        else:
            if self._wanted.include_usage:
                await self._event(self._answers.usage_chunk())
            await self._event("[DONE]")
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _news(self, event: Event) -> None:
        chunk = self._answers.chunk(event)
        if chunk is not None:
            await self._event(chunk)

    async def _event(self, content: dict[str, Any] | str) -> None:
        if not self._begun:
            self._begun = True
            kind = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await self._send({"type": "http.response.start", "status": 200, "headers": kind})
        data = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        await self._send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


def _check_method(scope: Scope, method: str) -> None:
    if scope["method"] != method:
        raise RequestError(
            f"{scope['path'][:80]} takes {method}, not {scope['method'][:20]}", status=405, headers={"Allow": method}
        )


async def _body(scope: Scope, receive: Receive, most_bytes: int) -> bytes:
    """Read a body, and no more of it than is allowed."""
    headers = Headers(scope=scope)
    length = headers.get("Content-Length")
    if length is None and "Transfer-Encoding" not in headers:
        raise RequestError("give the size of the body: Content-Length", status=411)
    if length is not None and int(length) > most_bytes:
        raise RequestError(f"the body has {length} bytes; send at most {most_bytes}", status=413)
    data, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        data += message.get("body", b"")
        more = message.get("more_body", False)
        if len(data) > most_bytes:
            raise RequestError(f"the body has more than {most_bytes} bytes; send at most so many", status=413)
    return bytes(data)


async def _apart(long: bool, work: Callable[[], _T]) -> _T:
    """Do a piece of work; in another thread if it takes long, so that no other client waits for it."""
    return await asyncio.to_thread(work) if long else work()
