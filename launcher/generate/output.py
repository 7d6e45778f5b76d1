"""What `biroute generate` prints: text as it comes, or JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from biroute.configs.messages import printable, printable_json
from biroute.data_pipeline.prepare.tokenizer import Tokenizer
from biroute.launcher.generate.continuation import Continuation, Prompt

END = {
    "end_of_document": "the end of the document",
    "stop": "a stop text",
    "max_tokens": "--max-tokens",
    "model_length": "the length of the model's sequences",
}


class Terminal:
    """Shows continuations: a single one piece by piece, several in their order, each once it is complete."""

    def __init__(self, prompts: Sequence[Prompt], *, echo: bool) -> None:
        """Show the continuations of `prompts`; `echo`: each behind its prompt."""
        self._waiting = list(prompts)
        self._single = len(prompts) == 1
        self._samples = any(prompt.sample for prompt in prompts)
        self._echo = echo
        self._complete: dict[Prompt, Continuation] = {}
        self._begun = False

    def on_text(self, answer: Continuation, piece: str) -> None:
        """Take a piece of text; called as `continuation.OnText` says."""
        if self._single:
            _write("" if self._begun else self._prompt(answer))
            self._begun = True
            _write(piece + ("\n" if answer.reason else ""))
        elif answer.reason is not None:
            self._complete[answer.prompt] = answer
            while self._waiting and self._waiting[0] in self._complete:
                self._show(self._complete.pop(self._waiting.pop(0)))

    def _show(self, answer: Continuation) -> None:
        sample = f", sample {answer.prompt.sample}" if self._samples else ""
        _write(f"--- prompt {answer.prompt.number}{sample}\n{self._prompt(answer)}{answer.text}\n")

    def _prompt(self, answer: Continuation) -> str:
        return answer.prompt.text if self._echo else ""


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
    return printable_json({**about, "texts": texts})


def summary(answers: Sequence[Continuation], seconds: float) -> str:
    """Say in one line how much was generated, why it ended and how long it took."""
    tokens = sum(len(answer.tokens) for answer in answers)
    reasons = sorted({END[answer.reason] for answer in answers if answer.reason})
    return f"{tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.0f} a second), ended by {', '.join(reasons)}"


def _write(text: str) -> None:
    sys.stdout.write(printable(text))
    sys.stdout.flush()
