"""The bodies of requests: OpenAI's fields, checked one by one, as what the worker does. No torch.

A field that BiRoute does not know is refused, and so is one that it cannot follow unless its value asks for nothing:
an answer that ignored a field in silence would be a wrong answer.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from biroute.launcher.generate.chat_template import ROLES, STOP, Message, render
from biroute.launcher.generate.settings import Settings
from biroute.launcher.serve.errors import RequestError

_COMPLETION_TOKENS = 16  # OpenAI's default
_MOST_STOPS = 16
# Fields that say nothing about the answer.
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# Fields that are not supported, and the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
}

_Probability = Annotated[float, Field(gt=0, le=1)]
_Warmth = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=1, le=128)]


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = None


class _Body(BaseModel):
    """What both kinds of completion share; null is the default everywhere."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: _Warmth | None = None
    top_p: _Probability | None = None
    n: _Count | None = None
    stop: Any = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    # Not OpenAI's: the other options of `biroute generate`.
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class _Completion(_Body):
    prompt: Any
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class _Chat(_Body):
    messages: Any
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class _Tokenize(BaseModel):
    """vLLM's; there is no special token to add, so that field may say either."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: Literal[False] | None = None


class _Detokenize(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None
    tokens: list[int]


_Kind = TypeVar("_Kind", bound=BaseModel)


@dataclass(frozen=True)
class Wanted:
    """A request that is right as far as can be said without the model.

    Attributes:
        model: the name that the client gave; None if it gave none.
        prompts: texts, or tokens.
        max_tokens: None: as many as the model has room for.
        settings: of the generation; its `max_tokens` is not yet right.
        n: continuations of each prompt.
        echo: put the prompt before its continuation.
        logprobs: how many of the likeliest tokens to report beside each token; None: no log-probabilities.
        stream: send pieces as they come.
        include_usage: send the numbers of tokens at the end of a stream.
        chat: the prompt is a conversation.
    """

    model: str | None
    prompts: tuple[str | tuple[int, ...], ...]
    max_tokens: int | None
    settings: Settings
    n: int
    echo: bool
    logprobs: int | None
    stream: bool
    include_usage: bool
    chat: bool = False


def completion(data: bytes) -> Wanted:
    """Read the body of `/v1/completions`.

    Raises:
        RequestError: a field is wrong.
    """
    body = _parse(_Completion, data)
    max_tokens = _COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise RequestError("max_tokens=0 asks for nothing; use at least 1, or echo", param="max_tokens")
    return Wanted(
        model=body.model, prompts=_prompts(body.prompt), max_tokens=max_tokens, settings=_settings(body),
        n=body.n or 1, echo=bool(body.echo), logprobs=body.logprobs, stream=bool(body.stream),
        include_usage=_include_usage(body),
    )  # fmt: skip


def chat_completion(data: bytes) -> Wanted:
    """Read the body of `/v1/chat/completions`.

    Raises:
        RequestError: a field is wrong.
    """
    body = _parse(_Chat, data)
    if body.max_tokens == 0:
        raise RequestError("max_tokens=0 asks for nothing; use at least 1", param="max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError(
            "top_logprobs needs logprobs=true; set it, or leave top_logprobs out", param="top_logprobs"
        )
    return Wanted(
        model=body.model, prompts=(render(_messages(body.messages)),),
        max_tokens=body.max_completion_tokens or body.max_tokens, settings=_settings(body, (STOP,)), n=body.n or 1,
        echo=False, logprobs=(body.top_logprobs or 0) if body.logprobs else None, stream=bool(body.stream),
        include_usage=_include_usage(body), chat=True,
    )  # fmt: skip


def tokenize(data: bytes) -> tuple[str | None, str]:
    """Read the body of `/tokenize`: model and text.

    Raises:
        RequestError: a field is wrong.
    """
    body = _parse(_Tokenize, data)
    return body.model, _unicode(body.prompt, "prompt")


def detokenize(data: bytes) -> tuple[str | None, list[int]]:
    """Read the body of `/detokenize`: model and tokens.

    Raises:
        RequestError: a field is wrong.
    """
    body = _parse(_Detokenize, data)
    return body.model, body.tokens


def _parse(kind: type[_Kind], data: bytes) -> _Kind:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):  # text that is not UTF-8 among them
        raise RequestError("the body is not JSON; send one JSON object in UTF-8") from None
    if not isinstance(fields, dict):
        raise RequestError("the body is not a JSON object; send one with the fields of the request")
    for name in _IGNORED:
        fields.pop(name, None)
    for name, neutral in _NEUTRAL.items():
        if name in fields and fields.pop(name) not in neutral:
            raise RequestError(f"{name} is not supported; leave it out", param=name, code="unsupported_parameter")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            message, code = f"{name} is unknown; leave it out", "unknown_parameter"
        elif first["type"] == "missing":
            message, code = f"{name} is missing; give it", "missing_required_parameter"
        else:
            message, code = f"{name}={_shown(first['input'])}: {first['msg']}", "invalid_value"
        raise RequestError(message, param=name, code=code) from None


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _settings(body: _Body, stop: tuple[str, ...] = ()) -> Settings:
    given = {"temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k, "min_p": body.min_p}
    given["repetition_penalty"] = body.repetition_penalty
    # Without a seed every request draws other numbers, as OpenAI's do.
    seed = secrets.randbits(62) if body.seed is None else body.seed
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return Settings(**chosen, stop=_stops(body.stop) + stop, seed=seed)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(one, str) and one for one in stops):
        raise RequestError(f"stop={_shown(value)}: give a text, or a list of texts, none empty", param="stop")
    if len(stops) > _MOST_STOPS:
        raise RequestError(f"stop has {len(stops)} texts; use at most {_MOST_STOPS}", param="stop")
    return tuple(_unicode(one, "stop") for one in stops)


def _include_usage(body: _Body) -> bool:
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream=true; set it, or leave it out", param="stream_options")
    return body.stream_options is not None and bool(body.stream_options.include_usage)


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    whole = [value] if isinstance(value, str) or _is_tokens(value) else value
    if not isinstance(whole, list) or not whole:
        raise _bad_prompt(value)
    prompts: list[str | tuple[int, ...]] = []
    for one in whole:
        if not one:
            raise RequestError("prompt is empty; give a text to continue", param="prompt")
        if isinstance(one, str):
            prompts.append(_unicode(one, "prompt"))
        elif _is_tokens(one):
            prompts.append(tuple(one))
        else:
            raise _bad_prompt(value)
    return tuple(prompts)


def _bad_prompt(value: Any) -> RequestError:
    return RequestError(
        f"prompt={_shown(value)}: give a text, tokens, a list of texts or a list of lists of tokens", param="prompt"
    )


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _unicode(text: str, field: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(f"{field} is no valid Unicode: half of a surrogate pair", param=field) from None
    return text


def _messages(value: Any) -> Sequence[Message]:
    if not isinstance(value, list) or not value:
        raise RequestError("messages is not a list of messages; give at least one", param="messages")
    messages = []
    for number, one in enumerate(value):
        place = f"messages.{number}"
        role, content = (one.get("role"), one.get("content")) if isinstance(one, dict) else (None, None)
        if role not in ROLES:
            raise RequestError(f"{place}.role={_shown(role)}: use one of {', '.join(ROLES)}", param=f"{place}.role")
        if isinstance(content, list):  # parts, of which only text can be read
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "".join(parts) if all(isinstance(part, str) for part in parts) else None  # type: ignore[arg-type]
        if not isinstance(content, str):
            raise RequestError(
                f"{place}.content is no text; give a string, or parts of text", param=f"{place}.content"
            )
        messages.append(Message(role, _unicode(content, f"{place}.content")))
    return messages
