"""Answers in OpenAI's form: completions, chat completions, and the chunks of their streams."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from biroute.data_pipeline.prepare.tokenizer import EOS, Tokenizer
from biroute.launcher.generate.chat_template import AnswerStream
from biroute.launcher.serve.bodies import Wanted
from biroute.launcher.serve.worker import ABORTED, Event, Text, Token

_FINISH = {
    "end_of_document": "stop",
    "stop": "stop",
    "max_tokens": "length",
    "model_length": "length",
    ABORTED: ABORTED,
}


class Answers:
    """Builds what is sent about one request, out of the events of its texts."""

    def __init__(self, wanted: Wanted, texts: Sequence[Text], tokenizer: Tokenizer, model: str) -> None:
        """`texts` are those of the order, in its order; `model` the name of the model."""
        self._wanted, self._texts, self._tokenizer = wanted, texts, tokenizer
        self._chat = chat = wanted.chat
        kind = "chat.completion" if chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": f"{kind}.chunk" if chat and wanted.stream else kind,
            "created": int(time.time()),
            "model": model,
        }
        self._streams = [AnswerStream() for _ in texts]
        self._offsets = [0] * len(texts)
        self._generated = 0
        self._begun: set[int] = set()

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """Return the answer, of all events of the order."""
        choices = []
        for index in range(len(self._texts)):
            own = [event for event in events if event.index == index]
            text = "".join(self._piece(event) for event in own)
            tokens = [token for event in own for token in self._tokens(event)]
            choice = self._choice(index, tokens, next((one.reason for one in own if one.reason), None))
            if self._chat:
                choices.append({**choice, "message": {"role": "assistant", "content": text, "refusal": None}})
            else:
                choices.append({**choice, "text": text})
        return {**self._head, "choices": choices, "usage": self._usage()}

    def chunk(self, event: Event) -> dict[str, Any] | None:
        """Return what a stream says of an event; None if nothing."""
        piece, tokens = self._piece(event), self._tokens(event)
        # Without log-probabilities a token that adds no text yet is no news.
        if not (piece or event.reason or (self._wanted.logprobs is not None and tokens)):
            return None
        choice = self._choice(event.index, tokens, event.reason)
        if self._chat:
            first = {} if event.index in self._begun else {"role": "assistant"}
            self._begun.add(event.index)
            choice["delta"] = {**first, **({"content": piece} if piece or first else {})}
        else:
            choice["text"] = piece
        return {**self._head, "choices": [choice]}

    def usage_chunk(self) -> dict[str, Any]:
        """Return the last chunk of a stream that was to have its usage."""
        return {**self._head, "choices": [], "usage": self._usage()}

    def _choice(self, index: int, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        logprobs = None
        if self._wanted.logprobs is not None:
            logprobs = self._chat_logprobs(tokens) if self._chat else self._completion_logprobs(index, tokens)
        return {"index": index, "logprobs": logprobs, "finish_reason": _FINISH[reason] if reason else None}

    def _piece(self, event: Event) -> str:
        if self._chat:
            return self._streams[event.index].push(event.piece)
        if event.of_prompt:
            return self._tokenizer.decode(token.token for token in event.tokens)
        return event.piece

    def _tokens(self, event: Event) -> tuple[Token, ...]:
        self._generated += 0 if event.of_prompt else len(event.tokens)
        return event.tokens

    def _usage(self) -> dict[str, int]:
        # A prompt counts once, however many continuations it has.
        prompt = sum(len(text.prompt.tokens) for text in self._texts if text.prompt.sample == 0)
        return {
            "prompt_tokens": prompt, "completion_tokens": self._generated, "total_tokens": prompt + self._generated
        }  # fmt: skip

    def _completion_logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            found["tokens"].append(self._name(token.token))
            found["token_logprobs"].append(token.choice.log_probability if token.choice else None)
            top = {self._name(one.token): one.log_probability for one in reversed(token.likeliest)}
            if token.choice and token.likeliest:
                top.setdefault(self._name(token.token), token.choice.log_probability)
            found["top_logprobs"].append(
                dict(sorted(top.items(), key=lambda pair: -pair[1])) if token.choice else None
            )
            found["text_offset"].append(self._offsets[index])
            self._offsets[index] += len(self._tokenizer.decode([token.token]))
        return found

    def _chat_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        content = []
        for token in tokens:
            assert token.choice is not None
            content.append(
                {**self._chat_token(token.token, token.choice.log_probability),
                 "top_logprobs": [self._chat_token(*one) for one in token.likeliest]}
            )  # fmt: skip
        return {"content": content, "refusal": None}

    def _chat_token(self, token: int, log_probability: float) -> dict[str, Any]:
        data = list(self._tokenizer.decode_bytes([token]))
        return {"token": self._name(token), "logprob": log_probability, "bytes": data}

    def _name(self, token: int) -> str:
        r"""Return a token's text; bytes that are no characters as OpenAI spells them, `bytes:\xe5`."""
        data = self._tokenizer.decode_bytes([token])
        if not data:
            return EOS if token == self._tokenizer.eos_id else f"<special {token}>"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
