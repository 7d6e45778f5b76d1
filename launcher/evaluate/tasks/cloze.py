"""cloze: the last word of a sentence, among other words of the same text, with less and more of the text before it.

Source: the last words of LAMBADA (arXiv:1606.06031), from the user's own text instead of novels, without the
filtering by people. What grows with the context is what the model gets out of it.
"""

from __future__ import annotations

import numpy as np

from biroute.launcher.evaluate.tasks.task import CHOICES, Item, TaskText

_SHORTEST = 16
ENDS = (".", "!", "?", "。", "！", "？", "\n")


class Cloze:
    """The task `cloze`."""

    name = "cloze"
    needs = f"sequences of at least {2 * _SHORTEST} tokens, and pieces of text with sentences in their second half"

    def problem(self, text: TaskText) -> str:
        if text.length < 2 * _SHORTEST:
            return f"sequences of {text.length} tokens are too short; it needs {2 * _SHORTEST}"
        if not self._places(text):
            return (
                f"no sentence ends with a word of one token, {text.length // 2} tokens or more after the begin "
                "of its text; give longer texts"
            )
        return ""

    def items(self, text: TaskText, count: int, seed: int) -> tuple[list[Item], str]:
        places, random = self._places(text), np.random.default_rng([seed, 3])
        chosen = random.permutation(len(places))[:count]
        items = []
        for unit, number in enumerate(chosen.tolist()):
            piece, at, others = places[number]
            right = int(text.pieces[piece][at])
            choices = (right, *map(int, random.choice(others, CHOICES - 1, replace=False)))
            for size in contexts(text.length):
                items.append(Item(text.pieces[piece][at - size : at], choices, f"context/{size:05d}", unit))
        about = f"the last word of {len(chosen)} sentences, among {CHOICES} words of their text, by tokens of context"
        if len(chosen) < count:
            about += f" (the text has no more than {len(chosen)} such sentences)"
        return items, about

    def _places(self, text: TaskText) -> list[tuple[int, int, np.ndarray]]:
        """Return piece and index of every word that can be asked for, and the other words of the text before it."""
        ends = {token for token, one in text.texts.items() if one.strip(" ").startswith(ENDS)}
        ends.add(text.tokenizer.eos_id)
        found, most = [], text.length // 2
        for number, piece in enumerate(text.pieces):
            is_word, is_end = np.isin(piece, text.words), np.isin(piece, list(ends))
            for at in (most + np.flatnonzero(is_word[most:-1] & is_end[most + 1 :])).tolist():
                others = np.unique(piece[at - most : at][is_word[at - most : at]])
                others = others[others != piece[at]]
                if len(others) >= CHOICES - 1:
                    found.append((number, at, others))
        return found


def contexts(length: int) -> list[int]:
    """Return 16, 64, 256 ... tokens up to half of `length`, and that half."""
    found, size = [], _SHORTEST
    while size < length // 2:
        found.append(size)
        size *= 4
    return [*found, length // 2]
