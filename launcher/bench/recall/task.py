"""Multi-query associative recall: key-value pairs scattered over a sequence, and later questions for their values.

A question repeats a key, and the answer is the value that followed the key's first occurrence. There is one question
for each key. The distance between pair and question is uniformly distributed as far as free positions allow, so a
local window of 1/8 of the tokens contains about 1/8 of the answers. Noise in between keeps pairs from being aligned
with regions.

Legend: B sequences, S tokens, Q questions of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from biroute.configs.errors import UsageError


@dataclass(frozen=True)
class RecallBatch:
    """Sequences with their questions. The token at `position` is a key, and the next token is its `answer`."""

    tokens: Tensor  # [B, S]
    position: Tensor  # [B, Q]
    answer: Tensor  # [B, Q]
    distance: Tensor  # [B, Q], tokens from the first occurrence of the key to the question


@dataclass(frozen=True)
class RecallTask:
    """Sizes of the task. Token ids are numbered in the order keys, values, noise."""

    sequence_length: int = 256
    num_pairs: int = 32
    num_keys: int = 64
    num_values: int = 64
    num_noise: int = 32

    def __post_init__(self) -> None:
        if self.num_pairs > self.num_keys:
            raise UsageError(f"{self.num_pairs} pairs need as many different keys; there are {self.num_keys}")
        if self.num_pairs < 1 or 8 * self.num_pairs > self.sequence_length:
            # A pair and its question take 4 tokens; in a fuller sequence, free positions are not found.
            raise UsageError(
                f"{self.num_pairs} pairs in {self.sequence_length} tokens: use 1 to {self.sequence_length // 8}"
            )

    @property
    def vocab_size(self) -> int:
        return self.num_keys + self.num_values + self.num_noise

    def batch(self, size: int, seed: int) -> RecallBatch:
        """Generate `size` sequences; a pure function of its arguments."""
        random = np.random.default_rng(seed)
        tokens = random.integers(
            self.num_keys + self.num_values, self.vocab_size, size=(size, self.sequence_length), dtype=np.int64
        )
        shape = (size, self.num_pairs)
        position, distance = np.empty(shape, np.int64), np.empty(shape, np.int64)
        answer = random.integers(self.num_keys, self.num_keys + self.num_values, size=shape, dtype=np.int64)
        for row in range(size):
            keys = random.permutation(self.num_keys)[: self.num_pairs]
            pair, position[row] = self._places(random)
            distance[row] = position[row] - pair
            for start in (pair, position[row]):
                tokens[row, start], tokens[row, start + 1] = keys, answer[row]
        return RecallBatch(*(torch.from_numpy(x) for x in (tokens, position, answer, distance)))

    def _places(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw the starts of the pairs and of their questions, [Q] each: two free tokens, at a uniform distance."""
        while True:
            free = np.ones(self.sequence_length, dtype=bool)
            pairs: list[int] = []
            questions: list[int] = []
            for _ in range(64 * self.num_pairs):
                distance = int(random.integers(2, self.sequence_length - 1))
                pair = int(random.integers(0, self.sequence_length - 1 - distance))
                question = pair + distance
                if free[pair : pair + 2].all() and free[question : question + 2].all():
                    free[pair : pair + 2] = free[question : question + 2] = False
                    pairs.append(pair)
                    questions.append(question)
                    if len(pairs) == self.num_pairs:
                        return np.array(pairs), np.array(questions)
