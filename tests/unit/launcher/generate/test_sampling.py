"""Choosing a token: against transformers' own processors, and at the edges."""

from __future__ import annotations

import math
from collections import Counter
from itertools import islice
from typing import Any

import pytest
import torch

from biroute.configs.errors import UsageError
from biroute.launcher.generate.sampling import choose_token, uniform_numbers
from biroute.launcher.generate.settings import Settings

LOGITS = torch.tensor([1.0, 3.0, 2.0, 3.0, -1.0, 0.5])
GRID = [step / 4096 for step in range(4096)]


def distribution(settings: Settings, seen: list[int] | None = None) -> torch.Tensor:
    """Share of each token over evenly spread numbers: the probabilities that are drawn from."""
    counts = Counter(choose_token(LOGITS, seen or [], settings, uniform).token for uniform in GRID)
    return torch.tensor([counts[token] / len(GRID) for token in range(len(LOGITS))])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.7, "temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_what_is_drawn_from_is_what_transformers_draws_from(options: dict[str, Any]) -> None:
    from transformers.generation import logits_process as theirs

    seen = [1, 4, 4]
    settings = Settings(**options)
    processors = [
        theirs.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty),
        theirs.TemperatureLogitsWarper(settings.temperature),
        *([theirs.TopKLogitsWarper(settings.top_k)] if settings.top_k else []),
        theirs.TopPLogitsWarper(settings.top_p),
        theirs.MinPLogitsWarper(settings.min_p),
    ]
    scores = LOGITS[None].clone()
    for processor in processors:
        scores = processor(torch.tensor([seen]), scores)
    expected = scores.softmax(-1)[0]
    torch.testing.assert_close(distribution(settings, seen), expected, atol=2 / len(GRID), rtol=0)


@pytest.mark.parametrize("logits", [LOGITS, LOGITS - 9])  # those all below 0 become -inf
@pytest.mark.parametrize("temperature", [1e-38, 1e-300])
def test_a_temperature_near_zero_draws_among_the_likeliest(logits: torch.Tensor, temperature: float) -> None:
    settings = Settings(temperature=temperature)
    assert [choose_token(logits, [], settings, u).token for u in (0.0, 0.49, 0.51, 0.99)] == [1, 1, 3, 3]
    penalized = Settings(temperature=temperature, repetition_penalty=1e-300)
    assert choose_token(logits, [2], penalized, 0.5).token == 2


def test_greedy_takes_the_lowest_of_the_likeliest() -> None:
    assert [choose_token(LOGITS, [], Settings(temperature=0), u).token for u in (0.0, 0.99)] == [1, 1]
    assert choose_token(LOGITS, [1, 3], Settings(temperature=0, repetition_penalty=2.0), 0.0).token == 2
    assert choose_token(-LOGITS.abs(), [5], Settings(temperature=0, repetition_penalty=9.0), 0.0).token == 0


def test_top_k_cuts_exactly_k_even_among_equals() -> None:
    assert set(distribution(Settings(top_k=1)).nonzero().flatten().tolist()) == {1}


def test_log_probabilities_are_those_of_the_model_whatever_cuts_the_draw() -> None:
    choice = choose_token(LOGITS, [1], Settings(temperature=0.3, top_k=1, repetition_penalty=0.5), 0.4)
    assert choice.log_probability == pytest.approx(float(LOGITS.log_softmax(0)[choice.token]), abs=1e-6)


def test_the_largest_number_draws_a_token_that_has_a_probability() -> None:
    logits = torch.tensor([0.0, 0.0, -math.inf])
    assert choose_token(logits, [], Settings(), math.nextafter(1.0, 0.0)).token == 1
    assert choose_token(logits, [], Settings(top_k=1), math.nextafter(1.0, 0.0)).token == 0


def test_numbers_depend_on_seed_and_sample_only() -> None:
    first = list(islice(uniform_numbers(0, 0), 1000))
    assert first == list(islice(uniform_numbers(0, 0), 1000))
    assert not {*first} & {*islice(uniform_numbers(1, 0), 1000)} and not {*first} & {
        *islice(uniform_numbers(0, 1), 1000)
    }
    assert 0.45 < sum(first) / 1000 < 0.55 and 0 <= min(first) < 0.01 and 0.99 < max(first) < 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("top_k", -1),
        ("top_p", 0.0), ("top_p", 1.01), ("top_p", math.nan), ("min_p", -0.1), ("min_p", 1.5), ("min_p", math.nan),
        ("repetition_penalty", 0.0), ("repetition_penalty", math.nan), ("seed", -1), ("seed", 2**63),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"^--{name.replace('_', '-')}={value} is out of range; use "):
        Settings(**{name: value})


def test_the_last_values_that_are_in_range() -> None:
    settings = Settings(min_p=1.0, top_p=1.0, max_tokens=1, seed=2**63 - 1)
    assert {choose_token(LOGITS, [], settings, uniform).token for uniform in GRID[::64]} == {1, 3}  # equally likely


def test_an_empty_stop_text_is_refused() -> None:
    with pytest.raises(UsageError, match="--stop is empty"):
        Settings(stop=("x", ""))
    with pytest.raises(UsageError, match="--stop is not valid UTF-8"):
        Settings(stop=("x", "\udcff"))  # what Python makes of a byte that is none
