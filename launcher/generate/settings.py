"""How text is continued: the options of a generation, checked. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from biroute.configs.errors import UsageError


@dataclass(frozen=True)
class Settings:
    """How tokens are chosen, and when a text ends.

    The logits go through the repetition penalty, the temperature, top-k, top-p and min-p, in this order, as in
    transformers.

    Attributes:
        max_tokens: most tokens after a prompt.
        temperature: what logits are divided by; 0: greedy, the likeliest token, of equal ones the lower id.
        top_k: only the so many likeliest tokens; 0: all.
        top_p: only the likeliest tokens that together have this probability (nucleus sampling, arXiv:1904.09751).
        min_p: only tokens with at least this fraction of the likeliest one's probability (arXiv:2407.01082).
        repetition_penalty: positive logits of tokens that occurred, in the prompt too, are divided by it, negative
            ones multiplied (CTRL, arXiv:1909.05858).
        stop: texts at which a continuation ends; they are not part of it.
        seed: of the draws.

    Raises:
        UsageError: a value is out of range.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        warm = math.isfinite(self.temperature) and self.temperature >= 0
        penalty = math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0
        for name, value, right, wanted in (
            ("max-tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, warm, "a number of at least 0 (0: greedy)"),
            ("top-k", self.top_k, self.top_k >= 0, "at least 0 (0: all tokens)"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1 (1: all tokens)"),
            ("min-p", self.min_p, 0 <= self.min_p <= 1, "from 0 (all tokens) to 1"),
            ("repetition-penalty", self.repetition_penalty, penalty, "a number above 0 (1: none)"),
            ("seed", self.seed, 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
        ):
            if not right:
                raise UsageError(f"--{name}={value} is out of range; use {wanted}")
        if "" in self.stop:
            raise UsageError("--stop is empty, and would end every text at once; give the text to stop at")
        if any("\ud800" <= one <= "\udfff" for one in "".join(self.stop)):
            raise UsageError("--stop is not valid UTF-8, which no text holds; give it in UTF-8")
