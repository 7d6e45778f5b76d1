"""needle: one sentence with a key and its value somewhere in a long text; what is the value?

Source: the retrieval tasks of RULER (arXiv:2404.06654), section 3, at the model's own length and with its own words;
there the answer is generated, here it is the likeliest of several values.
"""

from __future__ import annotations

import numpy as np

from biroute.launcher.evaluate.tasks.task import CHOICES, Item, TaskText

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the needle: 0 at the begin of the text, 1 just before the question
_BEFORE_KEY, _BEFORE_VALUE, _END = "\nThe value of", " is", ".\n"
_LEAST_FILLER = 4  # times the tokens of needle and question


class Needle:
    """The task `needle`."""

    name = "needle"
    needs = "a sequence five times as long as the sentence and its question, and as many tokens of text"

    def problem(self, text: TaskText) -> str:
        needle = self._around(text)
        least = (1 + _LEAST_FILLER) * needle
        if text.length < least:
            return f"sequences of {text.length} tokens are too short; it needs {least}"
        if len(text.stream) < text.length:
            return f"{len(text.stream)} tokens of text are too few; it needs {text.length}"
        if len(text.words) < CHOICES + 1:
            return f"{len(text.words)} different words are too few; it needs {CHOICES + 1}"
        return ""

    def items(self, text: TaskText, count: int, seed: int) -> tuple[list[Item], str]:
        encode = text.tokenizer.encode
        before_key, before_value, end = encode(_BEFORE_KEY), encode(_BEFORE_VALUE), encode(_END)
        items, in_filler = list[Item](), 0
        for number in range(count):
            random = np.random.default_rng([seed, 1, number])
            filler = text.filler(text.length - self._around(text), random)
            (key, *values), fits = text.draw_words(CHOICES + 1, filler, random)
            in_filler += not fits
            question = [*before_key, key, *before_value]
            for depth in DEPTHS:
                at = round(depth * len(filler))
                context = np.concatenate([filler[:at], [*question, values[0], *end], filler[at:], question])
                items.append(Item(context, tuple(map(int, values)), f"depth/{round(100 * depth):03d}", number))
        about = (
            f"a value, among {CHOICES}, that a sentence in {text.length} tokens of text gives, by the sentence's "
            "depth in percent"
        )
        if in_filler:
            about += f"; in {in_filler} of {count} texts the words also stand elsewhere"
        return items, about

    def _around(self, text: TaskText) -> int:
        """Return the tokens of needle and question."""
        before_key, before_value, end = map(text.tokenizer.encode, (_BEFORE_KEY, _BEFORE_VALUE, _END))
        return 2 * (len(before_key) + 1 + len(before_value)) + 1 + len(end)
