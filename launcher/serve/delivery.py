"""The way of a request's news from the model's thread to the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

from starlette.types import Receive

from biroute.launcher.serve.errors import ClientGoneError, RequestError
from biroute.launcher.serve.worker import Event, Order, Text, Worker


class Delivery:
    """Submits texts, and yields what happens to them, for the time of an `async with` block.

    The worker forgets the texts when the block ends before they do, or their client has gone.
    """

    def __init__(
        self, worker: Worker, texts: Sequence[Text], receive: Receive, *, stream: bool, most_behind: int
    ) -> None:
        """Prepare.

        Args:
            worker: continues the texts.
            texts: of one request.
            receive: of the request, whose body has been read.
            stream: news are wanted as they come; otherwise all at the end, which wakes the event loop once.
            most_behind: see `Limits.events_behind`.
        """
        self._worker, self._receive, self._stream, self._most_behind = worker, receive, stream, most_behind
        self._order = Order(texts, self._tell)
        self._untold = self._left = len(texts)  # texts whose end the model's thread, and the reader, have not seen
        self._events: deque[Event] = deque()
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()
        self._waking = self._gone = self._cut = False

    async def __aenter__(self) -> Delivery:
        """Submit the texts.

        Raises:
            RequestError: as in `Worker.submit`.
        """
        self._worker.submit(self._order)
        self._watch = asyncio.create_task(self._watch_client())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watch.cancel()
        if self._left:
            self._worker.cancel(self._order)

    async def events(self) -> AsyncIterator[Event]:
        """Yield all events of the texts.

        Raises:
            RequestError: a text failed.
            ClientGoneError: the client closed the connection.
        """
        while self._left:
            await self._news.wait()
            self._news.clear()
            while self._events and not self._gone:
                event = self._events.popleft()
                if event.error is not None:
                    raise event.error
                self._left -= event.reason is not None
                yield event
            if self._gone:
                raise ClientGoneError

    def _tell(self, event: Event) -> None:
        """Take an event; called in the model's thread."""
        if self._cut:
            return
        if self._stream and len(self._events) >= self._most_behind:
            self._cut = True
            self._worker.cancel(self._order)
            event = Event(event.index, error=RequestError("the stream was not read as fast as it was written"))
        self._untold -= event.reason is not None
        self._events.append(event)
        wanted = self._stream or not self._untold or event.error is not None
        if wanted and not self._waking:
            self._waking = True
            with suppress(RuntimeError):  # the loop has ended: nobody waits any more
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._waking = False  # first: an event that comes from now on wakes the loop again
        self._news.set()

    async def _watch_client(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._news.set()
