"""What `biroute generate` says before a text begins."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from biroute.launcher.generate.command import Request, _encode
from biroute.launcher.generate.model_choice import ModelChoice
from biroute.launcher.generate.settings import Settings


class Letters:
    eos_id = 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def request(truncate: bool) -> Request:
    return Request(ModelChoice(Path("run")), ["p" * 40, "p" * 50], samples=2, batch_size=1, truncate=truncate)


@pytest.mark.parametrize(
    ("truncate", "max_tokens", "said"),
    [
        (False, 14, []),
        (False, 15, ["prompt 1 has 50 tokens; the model's sequences of 64 have room for 14 more"]),
        (True, 20, ["prompt 1: only the last 44 of its 50 tokens"]),
        (
            True,
            99,
            ["prompt 0: only the last 1 ", "prompt 1: only the last 1 ", "prompt 0 has 1 tok", "prompt 1 has 1 tok"],
        ),
    ],
)
def test_what_does_not_fit_is_said_before(truncate: bool, max_tokens: int, said: list[str]) -> None:
    trained: Any = SimpleNamespace(
        config=SimpleNamespace(model=SimpleNamespace(sequence_length=64)), tokenizer=Letters()
    )
    lines: list[str] = []
    prompts = _encode(request(truncate), Settings(max_tokens=max_tokens), trained, lines.append)
    assert len(prompts) == 4
    assert len(lines) == len(said) and all(line.startswith(one) for line, one in zip(lines, said, strict=True)), lines
