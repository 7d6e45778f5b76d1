"""The one thread that owns the model, and continues the texts of all requests together.

A text gets the same tokens alone as beside any others (`biroute.model.decode.cached_model`), so a place that becomes
free goes to the next text at once, whoever asked for it.
"""

from __future__ import annotations

import math
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from biroute.data_pipeline.prepare.tokenizer import Tokenizer
from biroute.launcher.generate.continuation import Prompt, Running
from biroute.launcher.generate.sampling import Choice, log_probabilities
from biroute.launcher.generate.settings import Settings
from biroute.launcher.serve.errors import RequestError, stopping
from biroute.launcher.serve.metrics import Metrics
from biroute.model.decode.cached_model import CachedModel

ABORTED = "abort"  # the reason of a text that the end of the server cut off
_LONGEST_RETRY_SECONDS = 60


@dataclass(frozen=True)
class Text:
    """A text to continue.

    Attributes:
        prompt: its tokens.
        settings: how; None: nothing is generated, only the prompt is looked at.
        logprobs: how many of the likeliest tokens to report beside each; None: report nothing.
        echo: report the tokens of the prompt, too.
    """

    prompt: Prompt
    settings: Settings | None
    logprobs: int | None = None
    echo: bool = False


@dataclass(frozen=True)
class Token:
    """A token, and the likeliest ones in its place, most first; `choice` is None for a text's first token."""

    token: int
    choice: Choice | None
    likeliest: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class Event:
    """News of a text: tokens and what they add to it; `reason` is set at its end, `error` if there is no answer."""

    index: int
    tokens: tuple[Token, ...] = ()
    piece: str = ""
    reason: str | None = None
    error: RequestError | None = None
    of_prompt: bool = False


class Order:
    """The texts of one request.

    Attributes:
        tell: called in the model's thread with what happens to them, in its order; each text has exactly one event
            with a reason or an error.
        cancelled: set by whoever no longer wants them.
        begun: whether the model has begun with one of them.
    """

    def __init__(self, texts: Sequence[Text], tell: Callable[[Event], None]) -> None:
        self.texts, self.tell = list(texts), tell
        self.cancelled = False
        self.begun = False


@dataclass
class _Place:
    order: Order
    index: int
    running: Running
    began: float

    @property
    def text(self) -> Text:
        return self.order.texts[self.index]


class Worker:
    """Continues texts, up to `max_batch` at a time; up to `queue` more may wait."""

    def __init__(
        self, model: CachedModel, tokenizer: Tokenizer, max_batch: int, queue: int, metrics: Metrics
    ) -> None:
        self.model, self.tokenizer, self.metrics = model, tokenizer, metrics
        self.max_batch, self.most = max_batch, max_batch + queue
        self._waiting: deque[tuple[Order, int]] = deque()
        self._running: list[_Place] = []
        self._unfinished = 0  # waiting or running
        self._text_seconds = 1.0  # of a text, a moving average: what a full queue tells its clients to wait
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        # Not the list of those that run: a step takes them out of it, and nearly all of the time is in steps.
        metrics.gauges["running"] = lambda: self._unfinished - len(self._waiting)
        metrics.gauges["waiting"] = lambda: len(self._waiting)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Return whether texts are taken."""
        return self._thread.is_alive() and not self._stopping

    def check_count(self, count: int) -> None:
        """Check that so many texts of one request ever fit.

        Raises:
            RequestError: they do not.
        """
        if count > self.most:
            raise RequestError(
                f"prompt and n ask for {count} texts; this server takes at most {self.most} at a time", param="n"
            )

    def submit(self, order: Order) -> None:
        """Take an order.

        Raises:
            RequestError: it has more texts than ever fit (400), too many wait (429), or the server stops (503).
        """
        count = len(order.texts)
        self.check_count(count)
        with self._changed:
            if not self.alive:
                raise stopping()
            if self._unfinished + count > self.most:
                self.metrics.add("rejected")
                seconds = min(_LONGEST_RETRY_SECONDS, max(1, math.ceil(self._text_seconds)))
                raise RequestError(
                    f"{self._unfinished} texts are running or waiting, of at most {self.most}; try again later",
                    status=429, code="queue_full", headers={"Retry-After": str(seconds)},
                )  # fmt: skip
            self._unfinished += count
            self._waiting += [(order, index) for index in range(count)]
            self._changed.notify_all()

    def cancel(self, order: Order) -> None:
        """Forget an order: its places become free before the next token."""
        with self._changed:
            order.cancelled = True
            self._changed.notify_all()

    def stop(self, seconds: float) -> None:
        """End all texts with what they have, and wait up to so long for the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._stopping)
                if self._stopping:
                    break
            self._leave_cancelled()
            self._begin_next()
            self._step()
        for place in self._running:
            place_text = place.running.stream.finish()
            self._tell(place.order, Event(place.index, piece=place_text, reason=ABORTED))
        for order, index in self._waiting:
            error = None if order.begun else stopping()
            self._tell(order, Event(index, reason=None if error else ABORTED, error=error))

    def _leave_cancelled(self) -> None:
        with self._changed:
            left = [place for place in self._running if place.order.cancelled]
            waiting = [one for one in self._waiting if one[0].cancelled]
            self._running = [place for place in self._running if not place.order.cancelled]
            self._waiting = deque(one for one in self._waiting if not one[0].cancelled)
            self._unfinished -= len(left) + len(waiting)
        self.metrics.add("cancelled", len(left) + len(waiting))

    def _begin_next(self) -> None:
        while len(self._running) < self.max_batch and not self._stopping:
            with self._changed:
                if not self._waiting:
                    return
                order, index = self._waiting.popleft()
            order.begun = True
            try:
                self._begin(order, index)
            except Exception:
                self._fail(order, index)

    def _begin(self, order: Order, index: int) -> None:
        text, began = order.texts[index], time.monotonic()
        self.metrics.add("prompt_tokens", len(text.prompt.tokens))
        if text.echo:
            self._tell(order, Event(index, tokens=self._of_prompt(text), of_prompt=True))
        if text.settings is None:
            self._tell(order, Event(index, reason="max_tokens"))
            return
        sequence, logits_V = self.model.prefill(text.prompt.tokens)
        self._advance(_Place(order, index, Running(text.prompt, sequence, text.settings), began), logits_V)

    def _of_prompt(self, text: Text) -> tuple[Token, ...]:
        tokens = text.prompt.tokens
        if text.logprobs is None:
            return tuple(Token(token, None) for token in tokens)
        logits_SV = self.model.every_logit(tokens)
        pairs = zip(logits_SV, tokens[1:], strict=False)
        before = [self._token(logits_V, token, text.logprobs) for logits_V, token in pairs]
        return Token(tokens[0], None), *before

    def _token(self, logits_V: Tensor, token: int, count: int) -> Token:
        log_probability_V = log_probabilities(logits_V, self.tokenizer.vocab_size)
        found = log_probability_V.topk(min(count, len(log_probability_V)))
        likeliest = [Choice(*pair) for pair in zip(found.indices.tolist(), found.values.tolist(), strict=True)]
        return Token(token, Choice(token, float(log_probability_V[token])), tuple(likeliest))

    def _advance(self, place: _Place, logits_V: Tensor) -> None:
        piece = place.running.take(logits_V, self.tokenizer, self.model.model.sequence_length)
        answer = place.running.answer
        choice = answer.tokens[-1]
        logprobs = place.text.logprobs
        token = Token(choice.token, choice) if logprobs is None else self._token(logits_V, choice.token, logprobs)
        self.metrics.add("generated_tokens")
        if answer.reason is None:
            self._running.append(place)
        else:
            self._text_seconds += 0.2 * (time.monotonic() - place.began - self._text_seconds)
        self._tell(place.order, Event(place.index, (token,), piece, answer.reason))

    def _step(self) -> None:
        going, self._running = self._running, []
        if not going:
            return
        try:
            last = [place.running.answer.tokens[-1].token for place in going]
            logits_BV = self.model.step([place.running.sequence for place in going], last)
        except Exception:
            # Some caches may have the token and some not: none of these texts can go on.
            for place in going:
                self._fail(place.order, place.index)
            return
        for place, logits_V in zip(going, logits_BV, strict=True):
            try:
                self._advance(place, logits_V)
            except Exception:
                self._fail(place.order, place.index)

    def _fail(self, order: Order, index: int) -> None:
        traceback.print_exc(file=sys.stderr)
        self._tell(
            order, Event(index, error=RequestError("internal error; the server's output says more", status=500))
        )

    def _tell(self, order: Order, event: Event) -> None:
        if event.reason or event.error:
            with self._changed:
                self._unfinished -= 1
        order.tell(event)
