"""recall: pairs of key and value, then text, then a key; which value stood behind it?

Source: multi-query associative recall of Arora et al., Zoology (arXiv:2312.04927), here one query, with the distance
given and real text between.
"""

from __future__ import annotations

import numpy as np

from biroute.launcher.evaluate.tasks.task import CHOICES, Item, TaskText

_PAIRS = CHOICES  # the wrong choices are the values of the other keys: to have seen a word is not enough
_BLOCK = 2 * _PAIRS  # tokens


class Recall:
    """The task `recall`."""

    name = "recall"
    needs = f"sequences of at least {2 * _BLOCK} tokens, and as many tokens of text"

    def problem(self, text: TaskText) -> str:
        if text.length < 2 * _BLOCK:
            return f"sequences of {text.length} tokens are too short; it needs {2 * _BLOCK}"
        if len(text.stream) < text.length:
            return f"{len(text.stream)} tokens of text are too few; it needs {text.length}"
        if len(text.words) < _BLOCK:
            return f"{len(text.words)} different words are too few; it needs {_BLOCK}"
        return ""

    def items(self, text: TaskText, count: int, seed: int) -> tuple[list[Item], str]:
        items, in_filler = list[Item](), 0
        for number in range(count):
            for distance in distances(text.length):
                random = np.random.default_rng([seed, 2, number, distance])
                asked = int(random.integers(_PAIRS))
                filler = text.filler(distance + 2 * asked - _BLOCK, random)
                words, fits = text.draw_words(_BLOCK, filler, random)
                in_filler += not fits
                pairs = words.reshape(_PAIRS, 2)
                context = np.concatenate([pairs.ravel(), filler, pairs[asked, :1]])
                wrong = np.delete(pairs[:, 1], asked)
                choices = (int(pairs[asked, 1]), *map(int, wrong))
                items.append(Item(context, choices, f"distance/{distance:05d}", len(items)))
        about = (
            f"the value of a key, among those of {_PAIRS} keys, by the distance in tokens between the key's first "
            "place and the question"
        )
        if in_filler:
            about += f"; in {in_filler} of {len(items)} questions the words also stand in the text between"
        return items, about


def distances(length: int) -> list[int]:
    """Return the powers of two from 16 on that fit into `length` tokens wherever the asked pair stands."""
    found, distance = [], _BLOCK
    while distance + _BLOCK - 1 <= length:
        found.append(distance)
        distance *= 2
    return found
