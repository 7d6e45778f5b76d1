"""Tasks, answered by models whose answers are known: one that looks everything up, one that sees the last tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from biroute.configs.errors import UsageError
from biroute.launcher.evaluate.tasks.catalog import TASKS
from biroute.launcher.evaluate.tasks.cloze import Cloze, contexts
from biroute.launcher.evaluate.tasks.names import LOSS, NAMES, task_names
from biroute.launcher.evaluate.tasks.needle import Needle
from biroute.launcher.evaluate.tasks.recall import Recall, distances
from biroute.launcher.evaluate.tasks.task import TaskText, credit, score_task

LENGTH, WORDS, STOP, COMMA = 256, 300, 400, 401
FIRST_LETTER = 500


class Words:
    """A tokenizer of 300 words behind a space, a full stop, a comma, and letters for what tasks add."""

    eos_id = 0

    def encode(self, text: str) -> list[int]:
        return [FIRST_LETTER + ord(letter) for letter in text]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        def text(token: int) -> str:
            if token >= FIRST_LETTER:
                return chr(token - FIRST_LETTER)
            name = "".join(chr(97 + int(digit)) for digit in f"{token:03d}")
            return {STOP: ".", COMMA: ",", 0: ""}.get(token, f" w{name}")

        return "".join(map(text, ids)).encode()


def text_of(length: int = LENGTH, words: int = WORDS, pieces: int = 12, tokens: int = 600) -> TaskText:
    random = np.random.default_rng(0)
    drawn = [random.integers(1, words, tokens) for _ in range(pieces)]
    for piece in drawn:
        piece[7::8] = STOP
        piece[3::16] = COMMA
    tokenizer: Any = Words()
    return TaskText(tokenizer, drawn, length)


class Reader:
    """A model that finds the last place where its last `match` tokens stood before, within `sees` tokens."""

    def __init__(self, match: int, sees: int = LENGTH) -> None:
        self.match, self.sees = match, sees

    def next_log_probabilities(self, rows: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        for row in rows:
            assert len(row) <= LENGTH
            log = np.full(1000, -9.0)
            seen = row[-self.sees :].tolist()
            for place in range(len(seen) - self.match - 1, -1, -1):
                if seen[place : place + self.match] == seen[-self.match :]:
                    log[seen[place + self.match]] = -1.0
                    break
            yield log


def values(task: Any, model: Any, count: int = 12) -> dict[str, float]:
    section = score_task(model, task, text_of(), count=count, seed=0)
    assert section.chance == 1 / 8
    return {name: one.value for name, one in section.measures.items()}


def test_recall_is_right_for_a_model_that_reaches_the_distance_and_chance_for_others() -> None:
    assert distances(LENGTH) == [16, 32, 64, 128] and distances(32) == [16] and distances(31) == [16]
    assert values(Recall(), Reader(1)) == {"accuracy": 1.0} | {f"distance/{d:05d}": 1.0 for d in distances(LENGTH)}
    local = values(Recall(), Reader(1, sees=65))  # the key 64 tokens back is the first of the last 65
    assert local == {"accuracy": (3 + 1 / 8) / 4} | {f"distance/{d:05d}": 1.0 for d in (16, 32, 64)} | {
        "distance/00128": 1 / 8
    }
    assert values(Recall(), Reader(1, sees=64))["distance/00064"] == 1 / 8


class Blind:
    """A model that likes some words better than others, whatever the text says."""

    def next_log_probabilities(self, rows: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        log = np.random.default_rng(5).normal(size=1000)
        return iter([log] * len(rows))


@pytest.mark.parametrize("task", [Needle(), Recall()], ids=lambda task: task.name)
@pytest.mark.parametrize("words", [20, WORDS])
def test_a_model_that_does_not_read_is_right_by_chance(task: Any, words: int) -> None:
    """Also where few words make the choice narrow: no word is the right one more often than others are."""
    model: Any = Blind()
    found = score_task(model, task, text_of(words=words), count=300, seed=0).measures["accuracy"]
    assert abs(found.value - 1 / 8) < 3 * found.error < 0.08


def test_the_needle_is_found_where_the_model_looks() -> None:
    question = len("\nThe value of is") + 1
    found = values(Needle(), Reader(question))
    assert set(found.values()) == {1.0} and len(found) == 6
    near = values(Needle(), Reader(question, sees=LENGTH // 2))
    assert [near[f"depth/{depth:03d}"] for depth in (0, 25, 50, 75, 100)] == [1 / 8, 1 / 8, 1 / 8, 1.0, 1.0]
    items, _ = Needle().items(text_of(), 3, 0)
    assert all(len(item.context) == LENGTH for item in items)
    # Neither the key nor a choice stands in the filler: the needle says it once, the question the key again.
    for item in items:
        counts = [int((item.context == choice).sum()) for choice in item.choices]
        assert counts == [1] + [0] * 7


def test_cloze_asks_for_the_last_word_of_a_sentence_with_growing_context() -> None:
    text = text_of()
    items, about = Cloze().items(text, 10, 0)
    assert contexts(LENGTH) == [16, 64, 128] and contexts(32) == [16]
    assert about.startswith("the last word of 10 sentences") and len(items) == 30
    for item in items:
        size = int(item.group.removeprefix("context/"))
        assert len(item.context) == size
        places = [
            (piece, end) for piece in text.pieces for end in range(size, len(piece) - 1)
            if piece[end - size : end].tolist() == item.context.tolist()
        ]  # fmt: skip
        ((piece, end),) = places
        assert piece[end] == item.choices[0] and piece[end + 1] == STOP and end >= LENGTH // 2
        before = set(piece[end - LENGTH // 2 : end].tolist())
        assert len(set(item.choices)) == 8 and set(item.choices[1:]) <= before
    assert [item.unit for item in items] == [n // 3 for n in range(30)]
    _, about = Cloze().items(text, 10_000, 0)
    assert "(the text has no more than" in about


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_questions_depend_on_text_and_seed_alone(task: Any) -> None:
    def made(seed: int) -> list[Any]:
        return [(*item.context.tolist(), *item.choices, item.group) for item in task.items(text_of(), 5, seed)[0]]

    assert made(0) == made(0) != made(1)
    assert made(0)[: len(made(0)) // 5] == [
        (*item.context.tolist(), *item.choices, item.group) for item in task.items(text_of(), 1, 0)[0]
    ]  # --limit asks fewer of the same questions


@pytest.mark.parametrize(
    ("task", "text", "problem"),
    [
        (Needle(), text_of(length=64), "sequences of 64 tokens are too short; it needs"),
        (Needle(), text_of(pieces=1, tokens=100), "100 tokens of text are too few; it needs 256"),
        (Recall(), text_of(length=16), "sequences of 16 tokens are too short; it needs 32"),
        (Recall(), text_of(words=10), "9 different words are too few; it needs 16"),
        (Cloze(), text_of(length=16), "sequences of 16 tokens are too short"),
        (Cloze(), text_of(tokens=60), "no sentence ends with a word of one token, 128 tokens or more after"),
        *((task, text_of(), "") for task in TASKS.values()),
    ],
)
def test_what_a_task_lacks_is_said(task: Any, text: TaskText, problem: str) -> None:
    assert task.problem(text).startswith(problem) and bool(task.problem(text)) == bool(problem)


def test_words_that_also_stand_in_the_filler_are_counted() -> None:
    text = text_of(words=20)
    _, about = Recall().items(text, 5, 0)
    assert "questions the words also stand in the text between" in about
    _, about = Needle().items(text, 5, 0)
    assert "in 5 of 5 texts the words also stand elsewhere" in about


def test_equally_likely_answers_share_the_credit() -> None:
    assert credit(np.array([-1.0, -2.0])) == 1.0 and credit(np.array([-2.0, -1.0])) == 0.0
    assert credit(np.array([-1.0, -1.0, -3.0, -1.0])) == pytest.approx(1 / 3)


def test_names_of_tasks() -> None:
    assert (LOSS, *TASKS) == NAMES and [task.name for task in TASKS.values()] == list(TASKS)
    assert task_names("recall, loss,recall") == ["recall", "loss"] and task_names("all") == list(NAMES)
    for wanted, message in (
        ("nedle", "unknown task nedle; did you mean needle"),
        ("loss,xyz", "unknown task xyz; there are loss, needle, recall, cloze, or all"),
        (" ,", "names no task"),
    ):
        with pytest.raises(UsageError, match=message):
            task_names(wanted)
