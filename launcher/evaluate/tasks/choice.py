"""choice: which passage goes on with a text, its own or one from elsewhere, with less and more of the text before?

Source: the form of HellaSwag (arXiv:1905.07830), four endings of which one is the text's own, from the user's own
documents; the wrong ones are beginnings of sentences of other documents, not written by a model.
"""

from __future__ import annotations

import numpy as np

from biroute.launcher.evaluate.tasks.cloze import ENDS, contexts
from biroute.launcher.evaluate.tasks.task import Item, TaskText

_CHOICES = 4
_PASSAGE = 16  # tokens
_SHORTEST = 16  # tokens of context: with the passage, the longest context fits into twice as many


class Choice:
    """The task `choice`."""

    name = "choice"
    needs = (
        f"sequences of at least {2 * _SHORTEST} tokens, and sentences in the second half of several pieces of text"
    )

    def problem(self, text: TaskText) -> str:
        if text.length < 2 * _SHORTEST:
            return f"sequences of {text.length} tokens are too short; it needs {2 * _SHORTEST}"
        if len({piece for piece, _ in _places(text)}) < 2:
            return (
                f"fewer than two texts have a sentence that begins {text.length // 2} tokens or more after the "
                f"text's begin, with {_PASSAGE} more; give longer texts, or more of them"
            )
        return ""

    def items(self, text: TaskText, count: int, seed: int) -> tuple[list[Item], str]:
        places, random = _places(text), np.random.default_rng([seed, 5])
        items, units = list[Item](), 0
        for number in random.permutation(len(places)).tolist():
            if units == count:
                break
            piece, at = places[number]
            right = _passage(text, piece, at)
            # By the question alone: with fewer questions, they stay the same.
            wrong = _others(text, places, piece, right, np.random.default_rng([seed, 5, number]))
            if wrong is None:
                continue
            for size in contexts(text.length):
                context = text.pieces[piece][at - size : at]
                items.append(Item(context, (right, *wrong), f"context/{size:05d}", units))
            units += 1
        about = f"the next {_PASSAGE} tokens of {units} texts, among {_CHOICES} passages, by tokens of context"
        if units < count:
            about += f" (the text has no more than {units} such places)"
        return items, about


def _ends(text: TaskText) -> np.ndarray:
    ends = [token for token, one in text.texts.items() if one.strip(" ").endswith(ENDS)]
    return np.array([*ends, text.tokenizer.eos_id])


def _places(text: TaskText) -> list[tuple[int, int]]:
    """Return piece and index of every token that begins a sentence, with enough before and behind it."""
    most, ends, found = text.length // 2, _ends(text), list[tuple[int, int]]()
    for number, piece in enumerate(text.pieces):
        after_end = most + np.flatnonzero(np.isin(piece[most - 1 : len(piece) - _PASSAGE], ends))
        found += [(number, at) for at in after_end.tolist()]
    return found


def _passage(text: TaskText, piece: int, at: int) -> tuple[int, ...]:
    return tuple(text.pieces[piece][at : at + _PASSAGE].tolist())


def _others(
    text: TaskText, places: list[tuple[int, int]], piece: int, right: tuple[int, ...], random: np.random.Generator
) -> list[tuple[int, ...]] | None:
    """Draw different passages of other pieces; None if there are too few."""
    found = dict.fromkeys([right])
    for _ in range(20 * _CHOICES):
        other, at = places[int(random.integers(len(places)))]
        if other != piece:
            found[_passage(text, other, at)] = None
        if len(found) == _CHOICES:
            return list(found)[1:]
    return None
