"""Bodies of requests as what the worker does: defaults, and the end of an answer in a conversation."""

from __future__ import annotations

import json
from typing import Any

from biroute.launcher.serve.bodies import Wanted, chat_completion, completion


def read(kind: Any, **body: Any) -> Wanted:
    return kind(json.dumps(body).encode())


def test_what_is_left_out_is_openais_default() -> None:
    found = read(completion, prompt="a")
    assert (found.max_tokens, found.n, found.echo, found.logprobs, found.stream) == (16, 1, False, None, False)
    assert (found.settings.temperature, found.settings.top_p, found.settings.stop) == (1.0, 1.0, ())
    assert read(completion, prompt="a", temperature=None, n=None) != found, "each request draws with its own seed"
    chat = read(chat_completion, messages=[{"role": "user", "content": "a"}])
    assert (chat.max_tokens, chat.logprobs, chat.prompts) == (None, None, ("User: a\nAssistant:",))


def test_an_answer_ends_where_the_user_would_speak() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    found = read(chat_completion, messages=messages, stop="x", max_completion_tokens=3, max_tokens=9)
    assert found.settings.stop == ("x", "\nUser:") and found.max_tokens == 3
    assert found.prompts == ("User: ab\nAssistant:",)


def test_prompts_are_texts_or_tokens() -> None:
    for given, prompts in (
        ("a", ("a",)),
        ([1, 2], ((1, 2),)),
        (["a", "b"], ("a", "b")),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ):
        assert read(completion, prompt=given).prompts == prompts
