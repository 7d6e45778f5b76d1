"""What a client is told when a request cannot be answered, as OpenAI's error object."""

from __future__ import annotations

from typing import Any


class RequestError(Exception):
    """A request that is not answered.

    Attributes:
        status: of HTTP.
        message: one line: the field, its value and the remedy.
        param: the field of the request that is wrong, if one is.
        code: OpenAI's word for some of the errors.
        headers: further headers of the response.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """Return the error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


def stopping() -> RequestError:
    """Return what is said while the server stops."""
    return RequestError("the server is stopping; try again later", status=503, headers={"Retry-After": "5"})
