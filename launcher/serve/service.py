"""What a server answers with: the model, its name, and the way from a request's fields to texts for the worker."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from biroute.data_pipeline.prepare.tokenizer import EOS, Tokenizer
from biroute.launcher.generate.continuation import Prompt
from biroute.launcher.serve.bodies import Wanted
from biroute.launcher.serve.errors import RequestError
from biroute.launcher.serve.metrics import Metrics
from biroute.launcher.serve.worker import Text, Worker


class Service:
    """One model that is served.

    Attributes:
        name: of the model, as clients call it.
        worker: continues texts.
        metrics: what has been done.
    """

    def __init__(self, name: str, worker: Worker, metrics: Metrics) -> None:
        self.name, self.worker, self.metrics = name, worker, metrics
        self._created = int(time.time())

    @property
    def tokenizer(self) -> Tokenizer:
        """Return the model's tokenizer."""
        return self.worker.tokenizer

    def models(self) -> dict[str, Any]:
        """Return the list of models, which is one."""
        return {"object": "list", "data": [self.model(self.name)]}

    def model(self, name: str | None) -> dict[str, Any]:
        """Describe the model.

        Raises:
            RequestError: it has another name (404); None is any.
        """
        if name not in (None, self.name):
            raise RequestError(
                f"model={name!r} is not served here; use {self.name!r}, or leave it out",
                status=404, param="model", code="model_not_found",
            )  # fmt: skip
        longest = self.worker.model.model.sequence_length
        return {
            "id": self.name, "object": "model", "created": self._created, "owned_by": "biroute",
            "max_model_len": longest,
        }  # fmt: skip

    def tokenizer_info(self) -> dict[str, Any]:
        """Describe the tokenizer, as vLLM's `/tokenizer_info`; nothing stands before a text."""
        return {"eos_token": EOS, "bos_token": None, "pad_token": None, "chat_template": None}

    def tokenize(self, model: str | None, text: str) -> dict[str, Any]:
        """Return the tokens of a text; the end of a document, spelled alone, is the token that it names.

        Raises:
            RequestError: the model is another one.
        """
        longest = self.model(model)["max_model_len"]
        tokens = [self.tokenizer.eos_id] if text == EOS else self.tokenizer.encode(text)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": longest}

    def detokenize(self, model: str | None, tokens: Sequence[int]) -> dict[str, Any]:
        """Return the text of tokens.

        Raises:
            RequestError: the model is another one, or has no such token.
        """
        self.model(model)
        return {"prompt": self.tokenizer.decode(self._known(tokens, "tokens"))}

    def texts(self, wanted: Wanted) -> list[Text]:
        """Return the texts of a request: the samples of its first prompt, then those of the next one.

        Raises:
            RequestError: the model is another one, a prompt does not fit it, or these are too many texts.
        """
        self.model(wanted.model)
        self.worker.check_count(len(wanted.prompts) * wanted.n)  # before there are millions of them
        texts = []
        for number, prompt in enumerate(wanted.prompts):
            tokens = self._tokens(prompt)
            room = self._room(tokens, wanted)
            max_tokens = room if wanted.max_tokens is None else wanted.max_tokens
            settings = replace(wanted.settings, max_tokens=max_tokens) if max_tokens else None
            texts += [
                Text(Prompt(number, "", tuple(tokens), sample), settings, wanted.logprobs, wanted.echo)
                for sample in range(wanted.n)
            ]
        return texts

    def _tokens(self, prompt: str | tuple[int, ...]) -> Sequence[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return self._known(prompt, "prompt")

    def _known(self, tokens: Sequence[int], field: str) -> Sequence[int]:
        wrong = next((token for token in tokens if not 0 <= token < self.tokenizer.vocab_size), None)
        if wrong is not None:
            last = self.tokenizer.vocab_size - 1
            raise RequestError(f"{field} has the token {wrong}; this model has tokens 0 to {last}", param=field)
        return tokens

    def _room(self, tokens: Sequence[int], wanted: Wanted) -> int:
        longest = self.worker.model.model.sequence_length
        room = longest - len(tokens)
        if room < (0 if wanted.max_tokens == 0 else 1):
            raise RequestError(
                f"the prompt has {len(tokens)} tokens, but the model was trained with sequences of {longest}, with "
                "the continuation; shorten the prompt",
                param="messages" if wanted.chat else "prompt",
                code="context_length_exceeded",
            )  # fmt: skip
        return room
