"""Tasks, answered by models whose answers are known: one that looks everything up, one that sees the last tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from biroute.configs.errors import UsageError
from biroute.launcher.evaluate.tasks.catalog import TASKS
from biroute.launcher.evaluate.tasks.choice import Choice
from biroute.launcher.evaluate.tasks.cloze import Cloze, contexts
from biroute.launcher.evaluate.tasks.names import LOSS, NAMES, harness_names, task_names
from biroute.launcher.evaluate.tasks.needle import Needle
from biroute.launcher.evaluate.tasks.recall import Recall, distances
from biroute.launcher.evaluate.tasks.task import TaskText, credit, score_task
from biroute.launcher.evaluate.tasks.tracking import Tracking

LENGTH, WORDS, STOP, COMMA = 256, 300, 400, 401
TRACKING = 1100  # with a token for each letter, what tracking says is long
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

    def next_log_probabilities(self, rows: Sequence[np.ndarray], tokens: Sequence[Any]) -> Iterator[np.ndarray]:
        for row, wanted in zip(rows, tokens, strict=True):
            assert len(row) <= LENGTH
            log = np.full(1000, -9.0)
            seen = row[-self.sees :].tolist()
            for place in range(len(seen) - self.match - 1, -1, -1):
                if seen[place : place + self.match] == seen[-self.match :]:
                    log[seen[place + self.match]] = -1.0
                    break
            yield log[wanted]


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

    def next_log_probabilities(self, rows: Sequence[np.ndarray], tokens: Sequence[Any]) -> Iterator[np.ndarray]:
        log = np.random.default_rng(5).normal(size=1000)
        return iter([log[wanted] for wanted in tokens])


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


class Follower:
    """A model that follows names back to a value: as far as `hops`, then it takes the last value that it has seen."""

    def __init__(self, hops: int) -> None:
        self.hops = hops

    def next_log_probabilities(self, rows: Sequence[np.ndarray], tokens: Sequence[Any]) -> Iterator[np.ndarray]:
        encode = Words().encode
        begin, value, same = encode("\nThe value of"), encode(" is"), encode(" is that of")
        for row, wanted in zip(rows, tokens, strict=True):
            assert len(row) == TRACKING
            seen, values, links = row.tolist(), dict[int, int](), dict[int, int]()
            *places, asked = (n + len(begin) for n in range(len(seen)) if seen[n : n + len(begin)] == begin)
            for at in places:
                linked = seen[at + 1 : at + 1 + len(same)] == same
                assert linked or seen[at + 1 : at + 1 + len(value)] == value
                (links if linked else values)[seen[at]] = seen[at + 1 + len(same if linked else value)]
                # A name is handed on only after it has got its value.
                assert not linked or links[seen[at]] in {**values, **links}
            assert seen[asked + 1 :] == value and sorted(values.values()) == sorted(wanted)
            name = seen[asked]
            for _ in range(self.hops):
                name = links.get(name, name)
            log = np.full(1000, -9.0)
            log[values.get(name, list(values.values())[-1])] = -1.0
            yield log[wanted]


def test_values_are_tracked_as_far_as_a_model_follows_them() -> None:
    text, model = text_of(length=TRACKING, pieces=4, tokens=3000), Follower(2)
    section = score_task(model, Tracking(), text, count=40, seed=0)  # type: ignore[arg-type]
    found = {name: one.value for name, one in section.measures.items()}
    assert section.chance == 1 / 4 and list(found) == ["accuracy", *(f"hops/{n}" for n in (1, 2, 3, 4))]
    assert found["hops/1"] == found["hops/2"] == 1.0 and max(found["hops/3"], found["hops/4"]) < 0.5
    # No value and no name stands in the filler, where there are enough words.
    for item in Tracking().items(text, 3, 0)[0]:
        assert [int((item.context == choice).sum()) for choice in item.choices] == [1] * 4


class Continuing:
    """A model that knows the text by heart: each of its tokens behind the `sees` before it costs less."""

    def __init__(self, text: TaskText, sees: int) -> None:
        self.sees = sees
        self.known = {
            tuple(piece[at - sees : at + 1].tolist()) for piece in text.pieces for at in range(sees, len(piece))
        }

    def losses(self, rows: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        for row in rows:
            assert len(row) - 1 <= LENGTH
            known = [tuple(row[at - self.sees : at + 1].tolist()) in self.known for at in range(self.sees, len(row))]
            yield np.array([9.0] * (self.sees - 1) + [1.0 if one else 2.0 for one in known])


def test_the_passage_that_goes_on_is_chosen_by_who_knows_the_text() -> None:
    text = text_of()
    model: Any = Continuing(text, 3)
    section = score_task(model, Choice(), text, count=12, seed=0)
    assert section.chance == 1 / 4 and {name: one.value for name, one in section.measures.items()} == {
        "accuracy": 1.0, "context/00016": 1.0, "context/00064": 1.0, "context/00128": 1.0
    }  # fmt: skip
    items, about = Choice().items(text, 12, 0)
    assert about.startswith("the next 16 tokens of 12 texts") and len(items) == 36
    for item in items:
        ends = {STOP}  # passages begin sentences, wherever they come from, and differ
        assert item.context[-1] in ends and len(set(item.choices)) == 4
        pieces = []
        for passage in item.choices:
            places = [
                (number, at) for number, piece in enumerate(text.pieces) for at in range(1, len(piece) - 15)
                if tuple(piece[at : at + 16].tolist()) == passage
            ]  # fmt: skip
            ((number, at),) = places
            assert text.pieces[number][at - 1] in ends and at >= LENGTH // 2
            pieces.append(number)
        assert pieces[0] not in pieces[1:]
    blind = score_task(Constant(), Choice(), text, count=12, seed=0)  # type: ignore[arg-type]
    assert blind.measures["accuracy"].value == pytest.approx(1 / 4)


class Constant:
    """A model to which all texts are alike."""

    def losses(self, rows: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        return iter([np.ones(len(row) - 1) for row in rows])


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_questions_depend_on_text_and_seed_alone(task: Any) -> None:
    text = text_of(length=TRACKING, tokens=1500)

    def made(seed: int) -> list[Any]:
        return [(*item.context.tolist(), *item.choices, item.group) for item in task.items(text, 5, seed)[0]]

    assert made(0) == made(0) != made(1)
    assert made(0)[: len(made(0)) // 5] == [
        (*item.context.tolist(), *item.choices, item.group) for item in task.items(text, 1, 0)[0]
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
        (Tracking(), text_of(), "sequences of 256 tokens are too short; it needs"),
        (Tracking(), text_of(length=TRACKING, words=10, tokens=1500), "9 different words are too few; it needs 24"),
        (Choice(), text_of(length=16), "sequences of 16 tokens are too short"),
        (Choice(), text_of(pieces=1), "fewer than two texts have a sentence that begins 128 tokens or more after"),
        *((task, text_of(length=TRACKING, tokens=1500), "") for task in TASKS.values()),
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
    assert task_names("lm_eval:xyz,recall,all")[:2] == ["lm_eval:xyz", "recall"]
    assert harness_names(["loss", "lm_eval:a", "lm_eval:b"]) == ("a", "b")
    assert task_names("recall, loss,recall") == ["recall", "loss"] and task_names("all") == list(NAMES)
    for wanted, message in (
        ("nedle", "unknown task nedle; did you mean needle"),
        ("loss,xyz", "unknown task xyz; there are loss, needle, recall, tracking, cloze, choice, or all"),
        ("lm_eval:", "lm_eval: names no task"),
        (" ,", "names no task"),
    ):
        with pytest.raises(UsageError, match=message):
            task_names(wanted)
