"""Losses against slow references: one prefix at a time, two loops for bigrams, the last tokens alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.cached import cached_model, random_tokens, tiny_config

from biroute.configs.schema import RunConfig
from biroute.launcher.evaluate.forward import ForwardModel
from biroute.launcher.evaluate.losses import TokenLosses, ar_hits, far_context, mean_losses, score_windows
from biroute.launcher.evaluate.measure import ratio
from biroute.launcher.evaluate.windows import Window, document_windows, number_windows
from biroute.model.decode.cached_model import CachedModel

WINDOW = 8


@pytest.fixture(scope="module")
def model() -> tuple[RunConfig, CachedModel, ForwardModel]:
    config = tiny_config()
    cached = cached_model(config)
    return config, cached, ForwardModel(cached.layers, config)


def loss_of(cached: CachedModel, tokens: list[int], target: int) -> float:
    """The loss of one token by the whole model, run on the tokens before it and no other."""
    size = cached.model.attention.region_size
    padded = tokens + [0] * (-len(tokens) % size)
    with torch.no_grad():
        logits = cached.layers(torch.tensor([padded]))[len(tokens) - 1, 0]
    return -float(logits.double().log_softmax(-1)[target])


def windows_of(*lengths: int) -> list[Window]:
    documents = [random_tokens(n, seed) for seed, n in enumerate(lengths)]
    return number_windows([list(document_windows(one, 3, length=48, stride=20)) for one in documents])


def test_the_loss_of_each_token_is_that_of_one_prefix_at_a_time(
    model: tuple[RunConfig, CachedModel, ForwardModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where rows of several lengths are padded in one pass and logits come in chunks."""
    monkeypatch.setattr("biroute.launcher.evaluate.forward._LOGITS", 384 * 7)
    _, cached, forward = model
    rows = [np.array(random_tokens(n, n)) for n in (49, 2, 11, 30)]
    for row, losses in zip(rows, forward.losses(rows), strict=True):
        expected = [loss_of(cached, row[: end + 1].tolist(), row[end + 1]) for end in range(len(row) - 1)]
        np.testing.assert_allclose(losses, expected, rtol=0, atol=2e-5)
    tokens = [list(range(forward.vocabulary))] * len(rows)
    for row, log in zip(rows, forward.next_log_probabilities([row[:-1] for row in rows], tokens), strict=True):
        assert -log[row[-1]] == pytest.approx(loss_of(cached, row[:-1].tolist(), row[-1]), abs=2e-5)
        assert np.exp(log).sum() == pytest.approx(1.0)


def test_rows_that_do_not_fit_are_refused(model: tuple[RunConfig, CachedModel, ForwardModel]) -> None:
    for length in (1, 50):
        with pytest.raises(ValueError, match=r"tokens: a sequence has 1 \.\.\. 48"):
            list(model[2].losses([np.zeros(length, dtype=np.int64)]))


@pytest.mark.parametrize("window", [1, 4, 8, 30])
def test_ar_hits_are_those_of_two_loops(window: int) -> None:
    for seed in range(5):
        tokens = np.random.default_rng(seed).integers(0, 5, 40)
        expected = []
        for target in range(1, len(tokens)):
            places = [
                place for place in range(1, target)
                if (tokens[place - 1], tokens[place]) == (tokens[target - 1], tokens[target])
            ]  # fmt: skip
            seen = range(target - window, target)  # the last tokens before the target
            expected.append(bool(places) and not (places[-1] - 1 in seen and places[-1] in seen))
        assert ar_hits(tokens, window).tolist() == expected
        assert any(expected) or window == 30


def test_means_by_position_and_by_hit() -> None:
    losses = TokenLosses(
        nats=np.array([4.0, 2.0, 1.0, 3.0, 6.0]), position=np.array([0, 1, 2, 3, 4]),
        ar_hit=np.array([False, False, True, False, True]), size_bytes=np.array([1, 2, 0, 3, 2]),
        unit=np.array([0, 0, 0, 1, 1]),
    )  # fmt: skip
    found = mean_losses(losses)
    assert found["loss"].value == 3.2 and found["loss"].count == 5
    assert found["perplexity"].value == pytest.approx(math.exp(3.2))
    assert found["bits_per_byte"].value == pytest.approx(16 / math.log(2) / 8)
    positions = {name: one.value for name, one in found.items() if name.startswith("position/")}
    assert positions == {"position/00000": 4.0, "position/00001": 2.0, "position/00002": 2.0, "position/00004": 6.0}
    assert found["loss_on_ar_hits"].value == 3.5 and found["loss_on_no_ar_hits"].value == 3.0
    assert (found["loss_on_ar_hits"].count, found["loss_on_no_ar_hits"].count) == (2, 3)


def test_what_far_context_gives_is_paired_on_the_same_tokens(
    model: tuple[RunConfig, CachedModel, ForwardModel],
) -> None:
    _, cached, forward = model
    windows = windows_of(60, 30, 5)
    scored = score_windows(forward, windows, np.ones(320, dtype=np.int64), WINDOW)
    found = far_context(forward, windows, scored, window=WINDOW, most=1000)
    full, alone, units = [], [], []
    for one in windows:
        tokens = one.tokens.tolist()
        for target in range(one.first, len(tokens) - 1):
            if target + 1 > WINDOW:  # more context than the window
                full.append(loss_of(cached, tokens[: target + 1], tokens[target + 1]))
                alone.append(loss_of(cached, tokens[target + 1 - WINDOW : target + 1], tokens[target + 1]))
                units.append(one.unit)
    assert found["window_loss"].count == len(full) == 61 + 31 - 2 * WINDOW  # each token once
    assert found["full_context_loss"].value == pytest.approx(np.mean(full), abs=1e-5)
    assert found["window_loss"].value == pytest.approx(np.mean(alone), abs=1e-5)
    assert found["full_minus_window"].value == pytest.approx(np.mean(np.subtract(full, alone)), abs=1e-5)
    few = far_context(forward, windows, scored, window=WINDOW, most=3)
    assert few["window_loss"].count == 3 * sum(len(one.tokens) - 1 > WINDOW for one in windows)
    assert far_context(forward, windows, scored, window=48, most=9) == {}


def test_the_standard_error_is_that_of_many_draws() -> None:
    """Documents of unequal sizes whose tokens are alike: errors over tokens would be far too small."""
    random = np.random.default_rng(0)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        size = random.integers(1, 40, 30)
        return size * random.normal(3.0, 1.0, 30), size

    drawn = [ratio(*draw()) for _ in range(400)]
    assert np.mean([one.error for one in drawn]) == pytest.approx(np.std([one.value for one in drawn]), rel=0.1)
    assert math.isnan(ratio(np.array([3.0]), np.array([2])).error)
    assert math.isnan(ratio(np.array([0.0]), np.array([0])).value)
