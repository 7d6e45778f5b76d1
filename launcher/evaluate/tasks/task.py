"""What all tasks share: questions whose answer is one of several choices, made from the user's own text.

The choices of a question are single tokens, which all come from one forward pass, or passages of the same number of
tokens. So their likelihoods compare without any correction for length, and chance is 1 / choices exactly. Of equally
likely ones each counts as a part of an answer. Everything is drawn by seed, so the same text gives the same questions
for every checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from biroute.data_pipeline.prepare.tokenizer import Tokenizer
from biroute.launcher.evaluate.forward import ForwardModel
from biroute.launcher.evaluate.measure import Measure, ratio
from biroute.launcher.evaluate.results import Section

CHOICES = 8
_ENOUGH_WORDS = 64


class Item(NamedTuple):
    """One question."""

    context: np.ndarray  # [n] int64, n <= length of the model's sequences
    choices: tuple[int, ...] | tuple[tuple[int, ...], ...]  # tokens, or passages of equal length; the right one first
    group: str  # such as distance/00064: what accuracies are reported by
    unit: int  # items of a unit share their text, so standard errors are over units


@dataclass(frozen=True)
class TaskText:
    """What tasks are made of.

    Attributes:
        tokenizer: the model's.
        pieces: int64 arrays of connected text.
        length: tokens of the model's sequences.
    """

    tokenizer: Tokenizer
    pieces: Sequence[np.ndarray]
    length: int

    @cached_property
    def stream(self) -> np.ndarray:
        """All pieces, one after the other: filler in which nothing is asked for."""
        return np.concatenate(self.pieces)

    @cached_property
    def texts(self) -> dict[int, str]:
        """The text of each token that occurs and is whole characters."""
        found = {}
        for token in np.unique(self.stream).tolist():
            try:
                found[token] = self.tokenizer.decode_bytes([token]).decode("utf-8")
            except UnicodeDecodeError:
                continue
        return found

    @cached_property
    def words(self) -> np.ndarray:
        """Tokens that can be keys, values and answers: words behind a space or in a script without spaces.

        Where a small vocabulary has few of these, all tokens that are letters.
        """
        whole = [
            token for token, text in self.texts.items()
            if (text[:1] == " " and text[1:].isalpha() and len(text) > 3) or (text.isalpha() and not text.isascii())
        ]  # fmt: skip
        if len(whole) < _ENOUGH_WORDS:
            whole = [token for token, text in self.texts.items() if text.strip(" ").isalpha()]
        return np.array(whole, dtype=np.int64)

    def filler(self, count: int, random: np.random.Generator) -> np.ndarray:
        """Return `count` consecutive tokens of the stream, from a place that is drawn."""
        begin = int(random.integers(0, len(self.stream) - count + 1))
        return self.stream[begin : begin + count]

    def draw_words(self, count: int, without: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, bool]:
        """Draw different words that are not in `without`; if there are too few, any, and the answer is False too."""
        rest = np.setdiff1d(self.words, without)
        fits = len(rest) >= count
        return random.choice(rest if fits else self.words, count, replace=False), fits


class Task(Protocol):
    """A kind of question."""

    name: str
    needs: str  # in words, for --check

    def problem(self, text: TaskText) -> str:
        """Say why the task cannot be made of this text for a model of this length; "" if it can."""
        ...

    def items(self, text: TaskText, count: int, seed: int) -> tuple[list[Item], str]:
        """Make the questions.

        Args:
            text: what they are made of.
            count: questions of each group.
            seed: of what is drawn.

        Returns:
            The questions, and one sentence about them.
        """
        ...


def score_task(model: ForwardModel, task: Task, text: TaskText, *, count: int, seed: int) -> Section:
    """Answer the questions of a task: accuracy over all and by group, with standard errors."""
    items, about = task.items(text, count, seed)
    right = np.array([credit(scores) for scores in _scores(model, items)])
    units = np.array([item.unit for item in items])

    def mean(chosen: np.ndarray) -> Measure:
        return ratio(np.bincount(units[chosen], right[chosen]), np.bincount(units[chosen]))

    groups = np.array([item.group for item in items])
    measures = {"accuracy": mean(np.ones(len(items), dtype=bool))}
    measures |= {str(group): mean(groups == group) for group in np.unique(groups)}
    return Section(task.name, about, measures, "questions", chance=1 / len(items[0].choices))


def _scores(model: ForwardModel, items: Sequence[Item]) -> Iterator[np.ndarray]:
    """Yield the log-likelihoods of the choices of each item."""
    passages = [choice for item in items for choice in item.choices if isinstance(choice, tuple)]
    if not passages:
        tokens = [[choice for choice in item.choices if isinstance(choice, int)] for item in items]
        yield from model.next_log_probabilities([item.context for item in items], tokens)
        return
    contexts = [item.context for item in items for _ in item.choices]
    rows = [np.array([*context, *passage]) for context, passage in zip(contexts, passages, strict=True)]
    losses = model.losses(rows)
    for item in items:
        yield np.array([-next(losses)[len(item.context) - 1 :].sum() for _ in item.choices])


def credit(log_probabilities: np.ndarray) -> float:
    """Return how far the first choice is the likeliest: 1, 0, or a part of 1 where several are equally likely."""
    best = log_probabilities.max()
    return float(log_probabilities[0] == best) / int((log_probabilities == best).sum())
