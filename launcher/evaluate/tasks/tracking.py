"""tracking: values are handed on from name to name; which one does the last name of a chain have?

Source: variable tracking of RULER (arXiv:2404.06654), section 3, at the model's own length and with its own words;
there all names of one value are asked for and generated, here the value is, among those of four chains.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from biroute.launcher.evaluate.tasks.task import Item, TaskText

CHAINS = 4  # the wrong choices are the values of the other chains: to have seen a word is not enough
_MOST_HOPS = 4
_BEGIN, _VALUE, _SAME, _END = "\nThe value of", " is", " is that of", "."


class Tracking:
    """The task `tracking`."""

    name = "tracking"
    needs = f"a sequence twice as long as {2 * CHAINS} sentences, and as many tokens of text"

    def problem(self, text: TaskText) -> str:
        least = 2 * self._around(text, 1)
        if text.length < least:
            return f"sequences of {text.length} tokens are too short; it needs {least}"
        if len(text.stream) < text.length:
            return f"{len(text.stream)} tokens of text are too few; it needs {text.length}"
        words = CHAINS * (2 + max(self.hops(text)))
        if len(text.words) < words:
            return f"{len(text.words)} different words are too few; it needs {words}"
        return ""

    def hops(self, text: TaskText) -> list[int]:
        """Return how often a value may be handed on, 1 ... 4, so that sentences fill at most half of a sequence."""
        return [hops for hops in range(1, _MOST_HOPS + 1) if 2 * self._around(text, hops) <= text.length]

    def items(self, text: TaskText, count: int, seed: int) -> tuple[list[Item], str]:
        items, in_filler = list[Item](), 0
        for number in range(count):
            for hops in self.hops(text):
                random = np.random.default_rng([seed, 4, number, hops])
                filler = text.filler(text.length - self._around(text, hops), random)
                words, fits = text.draw_words(CHAINS * (2 + hops), filler, random)
                in_filler += not fits
                chains = words.reshape(CHAINS, 2 + hops)  # of each: its value, then its names in their order
                context = self._context(text, chains, filler, random)
                items.append(Item(context, tuple(map(int, chains[:, 0])), f"hops/{hops}", len(items)))
        about = (
            f"the value of a name, among those of {CHAINS} chains of names in {text.length} tokens of text, by how "
            "often it was handed on"
        )
        if in_filler:
            about += f"; in {in_filler} of {len(items)} texts the words also stand elsewhere"
        return items, about

    def _context(
        self, text: TaskText, chains: np.ndarray, filler: np.ndarray, random: np.random.Generator
    ) -> np.ndarray:
        """Strew the sentences of all chains over the filler, and ask for the last name of the first chain."""
        encode = text.tokenizer.encode
        begin, value, same, end = map(encode, (_BEGIN, _VALUE, _SAME, _END))

        def sentence(chain: np.ndarray, number: int) -> Sequence[int]:
            return [*begin, chain[number + 1], *(same if number else value), chain[number], *end]

        # Chains are mixed, and each keeps its order.
        turns = random.permutation(np.repeat(np.arange(len(chains)), chains.shape[1] - 1))
        said, places = [0] * len(chains), np.sort(random.integers(0, len(filler) + 1, len(turns)))
        parts, before = list[Sequence[int]](), 0
        for chain, place in zip(turns.tolist(), places.tolist(), strict=True):
            parts += [filler[before:place].tolist(), sentence(chains[chain], said[chain])]
            said[chain], before = said[chain] + 1, place
        question = [*begin, chains[0, -1], *value]
        return np.concatenate([*parts, filler[before:], question]).astype(np.int64)

    def _around(self, text: TaskText, hops: int) -> int:
        """Return the tokens of all sentences and the question."""
        begin, value, same, end = (len(text.tokenizer.encode(one)) for one in (_BEGIN, _VALUE, _SAME, _END))
        chain = begin + value + end + 2 + hops * (begin + same + end + 2)
        return CHAINS * chain + begin + value + 1
