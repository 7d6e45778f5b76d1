"""The baseline that a trained model has to beat: a bigram model of the same tokens.

It is interpolated modified Kneser-Ney with three discounts at both orders and a uniform floor, counted over every
token of the training split and scored on the same sequences that training evaluates on.

Source: Chen and Goodman, An Empirical Study of Smoothing Techniques for Language Modeling (1998).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from biroute.configs.errors import UsageError
from biroute.data_pipeline.dataset import Dataset
from biroute.data_pipeline.read.loader import check_evaluate_sequences
from biroute.data_pipeline.read.token_stream import TokenStream

_CHUNK_TOKENS = 8_000_000


@dataclass(frozen=True)
class BigramScore:
    """How well the bigram model predicts the held-out sequences."""

    bits_per_byte: float
    nats_per_token: float
    target_tokens: int
    target_bytes: int
    training_tokens: int
    distinct_bigrams: int


class BigramModel:
    """p(next token | token) by interpolated modified Kneser-Ney."""

    def __init__(self, keys: np.ndarray, counts: np.ndarray, vocab_size: int) -> None:
        """Build the model from counted bigrams.

        Args:
            keys: int64 [n], ascending: first * vocab_size + second of each distinct bigram.
            counts: int64 [n], how often each occurs, at least 1.
            vocab_size: number of tokens in the vocabulary.
        """
        self._keys = keys
        self._counts = counts
        self._vocab_size = vocab_size
        first, second = np.divmod(keys, vocab_size)
        discounts = _discounts(counts)
        self._discount = discounts[np.minimum(counts, 3)]
        self._context_total = np.bincount(first, weights=counts, minlength=vocab_size)
        freed = np.bincount(first, weights=self._discount, minlength=vocab_size)
        # The probability mass that the discounts free goes to the unigram; after an unseen token that is all of it.
        seen = self._context_total > 0
        self._backoff = np.divide(freed, self._context_total, out=np.ones(vocab_size), where=seen)
        self._unigram = _continuation(np.bincount(second, minlength=vocab_size))

    def probability(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Return p(second | first), elementwise: float64 [n] for two int64 [n]."""
        wanted = first * self._vocab_size + second
        at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        found = self._keys[at] == wanted
        direct = np.where(found, self._counts[at] - self._discount[at], 0.0)
        total = np.maximum(self._context_total[first], 1.0)
        return direct / total + self._backoff[first] * self._unigram[second]


def count_bigrams(streams: Iterator[TokenStream], vocab_size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Count bigrams; returns the distinct ones as ascending keys, their counts, and the number of tokens read."""
    keys = np.empty(0, dtype=np.int64)
    counts = np.empty(0, dtype=np.int64)
    num_tokens = 0
    for stream in streams:
        num_tokens += stream.num_tokens
        for start in range(0, stream.num_tokens - 1, _CHUNK_TOKENS):
            tokens = stream.read(start, min(start + _CHUNK_TOKENS + 1, stream.num_tokens))
            new_keys, new_counts = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
            keys, inverse = np.unique(np.concatenate([keys, new_keys]), return_inverse=True)
            counts = np.bincount(inverse, weights=np.concatenate([counts, new_counts])).astype(np.int64)
    return keys, counts, num_tokens


def train_bigram(dataset: Dataset) -> tuple[BigramModel, int, int]:
    """Train the model on all training tokens.

    Returns:
        The model, the number of training tokens, and the number of distinct bigrams.

    Raises:
        UsageError: the training split contains no bigram.
    """
    manifest = dataset.manifest
    streams = (TokenStream(dataset.config.data.dir, manifest, source, "train") for source in manifest.sources)
    keys, counts, num_tokens = count_bigrams(streams, manifest.vocab_size)
    if not len(keys):
        raise UsageError(f"data.dir={dataset.config.data.dir}: the training split is too small for a bigram model")
    return BigramModel(keys, counts, manifest.vocab_size), num_tokens, len(keys)


def score_bigram(dataset: Dataset) -> BigramScore:
    """Train on the training split and score on the first `train.evaluate_sequences` held-out sequences.

    The targets are those of objective=causal: every token of a sequence except the first, given the one before.

    Raises:
        UsageError: there are too few held-out sequences, or no training text.
    """
    reader = dataset.reader("heldout")
    wanted = dataset.evaluate_sequences(1)
    check_evaluate_sequences(reader, wanted)
    model, training_tokens, distinct = train_bigram(dataset)
    nats = 0.0
    target_tokens = target_bytes = 0
    for position in range(wanted):
        tokens = reader.sequence(position)
        nats -= float(np.log(model.probability(tokens[:-1], tokens[1:])).sum())
        target_tokens += len(tokens) - 1
        target_bytes += int(dataset.token_bytes[tokens[1:]].sum())
    return BigramScore(
        bits_per_byte=nats / math.log(2) / target_bytes,
        nats_per_token=nats / target_tokens,
        target_tokens=target_tokens,
        target_bytes=target_bytes,
        training_tokens=training_tokens,
        distinct_bigrams=distinct,
    )


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Estimate the discounts [4] of counts 0, 1, 2 and 3 or more from the counts of counts."""
    ones, twos, threes, fours = (float((counts == n).sum()) for n in (1, 2, 3, 4))
    if not (ones and twos and threes and fours):
        return np.array([0.0, 0.5, 0.5, 0.5])  # too little text for estimates: any discount below 1 is valid
    y = ones / (ones + 2 * twos)
    estimates = [1 - 2 * y * twos / ones, 2 - 3 * y * threes / twos, 3 - 4 * y * fours / threes]
    # Unusual counts of counts give discounts out of range: each must free some mass and leave a positive count.
    bounded = [min(max(estimate, 0.05), n - 0.05) for n, estimate in zip((1, 2, 3), estimates, strict=True)]
    return np.array([0.0, *bounded])


def _continuation(contexts: np.ndarray) -> np.ndarray:
    """Return the Kneser-Ney unigram [vocab]: by the number of distinct preceding tokens, smoothed to the uniform."""
    discount = _discounts(contexts[contexts > 0])[np.minimum(contexts, 3)]
    total = contexts.sum()
    return (contexts - discount) / total + discount.sum() / total / len(contexts)
