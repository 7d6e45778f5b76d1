"""How long a busy server asks to be left alone: the header Retry-After, which MLflow's client drops without retries.

With retries of its own the client would heed it, but repeat a creation as well, and a run could be there twice.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from urllib3.util import Retry

_LONGEST_SECONDS = 600.0
_left_alone_until = 0.0  # by time.monotonic()


class _NotingRetry(Retry):
    """urllib3's rule of when to try again, which sees each answer that is an error; it decides as ever."""

    def increment(self, *arguments: Any, **named: Any) -> Retry:  # type: ignore[override]
        response = named.get("response")
        if response is not None:
            _note(response.status, response.headers)
        return super().increment(*arguments, **named)


def note_retry_after() -> None:
    """Have MLflow's client note the header in every answer from now on. To be called before its first request."""
    from mlflow.utils import request_utils

    request_utils.Retry = _NotingRetry


def seconds_to_wait() -> float:
    """Return how many seconds from now the last server that was busy still wants to be left alone; 0 if none does."""
    return max(0.0, _left_alone_until - time.monotonic())


def _note(status: int, headers: Mapping[str, str]) -> None:
    global _left_alone_until
    if status in (429, 503):
        asked = min(_LONGEST_SECONDS, _seconds(headers.get("Retry-After", "")))
        _left_alone_until = max(_left_alone_until, time.monotonic() + asked)


def _seconds(text: str) -> float:
    """Return the seconds of a header: a number, or a date of HTTP (RFC 9110, 10.2.3); 0 if it is neither."""
    if text.strip().isdecimal():
        return float(text)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0
