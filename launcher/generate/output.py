"""What `biroute generate` prints: text as it comes, or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from biroute.configs.messages import printable
from biroute.data_pipeline.prepare.tokenizer import Tokenizer
from biroute.launcher.generate.continuation import Continuation

END = {
    "end_of_document": "the end of the document",
    "stop": "a stop text",
    "max_tokens": "--max-tokens",
    "model_length": "the length of the model's sequences",
}


class Terminal:
    """Shows continuations: a single one piece by piece, several one after the other, each when it is complete."""

    def __init__(self, count: int, *, echo: bool) -> None:
        """Show `count` continuations; `echo`: each behind its prompt."""
        self._count, self._echo = count, echo
        self._begun = False

    def on_text(self, answer: Continuation, piece: str) -> None:
        """Take a piece of text; called as `continuation.OnText` says."""
        if self._count > 1:
            return
        if not self._begun and self._echo:
            _write(answer.prompt.text)
        self._begun = True
        _write(piece)
        if answer.reason is not None:
            _write("\n")

    def show(self, answers: Sequence[Continuation]) -> None:
        """Show what has not been shown while it came."""
        if self._count == 1:
            return
        for answer in answers:
            prompt = answer.prompt
            sample = f", sample {prompt.sample}" if any(one.prompt.sample for one in answers) else ""
            _write(f"--- prompt {prompt.number}{sample}\n{prompt.text if self._echo else ''}{answer.text}\n")


def as_json(answers: Sequence[Continuation], tokenizer: Tokenizer, about: dict[str, Any]) -> str:
    """Format all continuations as one JSON object.

    Args:
        answers: the continuations.
        tokenizer: says which bytes a token is.
        about: what stands in front: checkpoint, step, settings.
    """
    texts = [
        {
            "prompt": answer.prompt.number,
            "sample": answer.prompt.sample,
            "prompt_tokens": len(answer.prompt.tokens),
            "text": answer.text,
            "reason": answer.reason,
            "stopped_at": answer.stopped_at,
            "tokens": [
                {
                    "id": choice.token,
                    "bytes": list(tokenizer.decode_bytes([choice.token])),
                    "log_probability": choice.log_probability,
                }
                for choice in answer.tokens
            ],
        }
        for answer in answers
    ]
    return json.dumps({**about, "texts": texts}, ensure_ascii=False)


def summary(answers: Sequence[Continuation], seconds: float) -> str:
    """Say in one line how much was generated, why it ended and how long it took."""
    tokens = sum(len(answer.tokens) for answer in answers)
    reasons = sorted({END[answer.reason] for answer in answers if answer.reason})
    return f"{tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.0f} a second), ended by {', '.join(reasons)}"


def _write(text: str) -> None:
    sys.stdout.write(printable(text))
    sys.stdout.flush()
