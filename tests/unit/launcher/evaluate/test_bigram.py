"""The bigram baseline: its probabilities, its counts, and its score of the held-out text."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from helpers.corpora import tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

from biroute.data_pipeline.dataset import Dataset
from biroute.data_pipeline.read.token_stream import TokenStream
from biroute.launcher.evaluate import bigram
from biroute.launcher.evaluate.bigram import BigramModel, count_bigrams, score_bigram, train_bigram


def kneser_ney_twin(pairs: list[tuple[int, int]], vocab_size: int) -> np.ndarray:
    """p[first, second] by dictionaries and the textbook's formulas; needs counts of 1 to 4 at both levels."""

    def discounts(counts: list[int]) -> dict[int, float]:
        n = Counter(counts)
        y = n[1] / (n[1] + 2 * n[2])
        return {k: min(max(k - (k + 1) * y * n[k + 1] / n[k], 0.05), k - 0.05) for k in (1, 2, 3)}

    counts = Counter(pairs)
    followers = {a: [(b, c) for (x, b), c in counts.items() if x == a] for a in {a for a, _ in counts}}
    contexts = Counter(b for _, b in counts)
    d1, d2 = discounts(list(contexts.values())), discounts(list(counts.values()))
    kinds = sum(contexts.values())
    freed = sum(d1[min(n, 3)] for n in contexts.values()) / kinds
    unigram = [
        (max(contexts[b] - d1[min(contexts[b], 3)], 0) if contexts[b] else 0) / kinds + freed / vocab_size
        for b in range(vocab_size)
    ]
    table = np.tile(unigram, (vocab_size, 1))
    for a, found in followers.items():
        total = sum(c for _, c in found)
        table[a] *= sum(d2[min(c, 3)] for _, c in found) / total
        for b, c in found:
            table[a, b] += (c - d2[min(c, 3)]) / total
    return table


def test_bigram_equals_its_slow_twin_and_sums_to_one() -> None:
    draw = np.random.default_rng(0)
    tokens = np.minimum(draw.zipf(1.4, size=4000) - 1, 59)
    pairs = list(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))
    keys, counts = np.unique(tokens[:-1] * 64 + tokens[1:], return_counts=True)
    model = BigramModel(keys, counts, 64)
    first, second = np.divmod(np.arange(64 * 64), 64)
    table = model.probability(first, second).reshape(64, 64)
    np.testing.assert_allclose(table, kneser_ney_twin(pairs, 64), rtol=1e-10)
    np.testing.assert_allclose(table.sum(axis=1), 1.0, rtol=1e-12)  # also for contexts never seen (60 ... 63)
    assert table.min() > 0


@settings(max_examples=50)
@given(tokens=st.lists(st.integers(0, 9), min_size=2, max_size=60))
def test_bigram_is_a_distribution_on_any_tiny_text(tokens: list[int]) -> None:
    array = np.array(tokens)
    keys, counts = np.unique(array[:-1] * 12 + array[1:], return_counts=True)
    first, second = np.divmod(np.arange(144), 12)
    table = BigramModel(keys, counts, 12).probability(first, second).reshape(12, 12)
    np.testing.assert_allclose(table.sum(axis=1), 1.0, rtol=1e-12)
    assert table.min() > 0


def test_bigram_counts_every_pair_across_chunks(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bigram, "_CHUNK_TOKENS", 777)
    manifest = dataset.manifest
    streams = [TokenStream(dataset.config.data.dir, manifest, entry, "train") for entry in manifest.sources]
    keys, counts, num_tokens = count_bigrams(iter(streams), 512)
    expected: Counter[int] = Counter()
    for source in (0, 1):
        tokens = tokens_of(dataset, source, "train")
        expected.update((tokens[:-1] * 512 + tokens[1:]).tolist())
    assert dict(zip(keys.tolist(), counts.tolist(), strict=True)) == expected
    assert num_tokens == manifest.tokens("train")


def test_bigram_scores_the_sequences_of_evaluation(dataset: Dataset) -> None:
    score = score_bigram(dataset)
    model, _, _ = train_bigram(dataset)
    batches = list(dataset.heldout_batches(data_rank=0, data_size=1))
    nats = -sum(float(np.log(model.probability(b.inputs.ravel(), b.labels.ravel())).sum()) for b in batches)
    assert score.target_bytes == sum(batch.target_bytes for batch in batches)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / score.target_bytes)
    unigram = np.bincount(np.concatenate([tokens_of(dataset, s, "train") for s in (0, 1)]), minlength=512) + 1.0
    unigram /= unigram.sum()
    baseline = -sum(float(np.log(unigram[batch.labels]).sum()) for batch in batches)
    assert nats < 0.8 * baseline
