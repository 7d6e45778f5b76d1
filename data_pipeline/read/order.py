"""The training order: which sequence is at global position n. Pure arithmetic, no state, no I/O.

The result depends only on the sizes of the sources, their weights, the seed and n; in particular, it does not depend
on the number of ranks. The number of consumed sequences is therefore the whole state of the data during training.

Sources are mixed by a fixed pattern of slots that repeats indefinitely, so the number of sequences that a source
contributed before n follows from a division and a table look-up. Within a source, each epoch is a permutation by a
keyed Feistel network, which visits every sequence exactly once in constant memory. Without weights, all sources form
one pool, and one epoch of the pool is one pass over all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Each weight is accurate to one slot, and every source has at least one slot.
_PATTERN_SLOTS = 4096
# On a domain of a few elements, a Feistel network needs more than the usual four rounds to look random.
_ROUNDS = 8
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)  # the finalizer of splitmix64
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


def derive_key(*parts: int | str) -> np.ndarray:
    """Derive round keys, [_ROUNDS] uint64, from seeds, names and counters."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Apply the permutation of 0 ... size - 1 that `key` selects.

    Args:
        index: [n] int64, each in 0 ... size - 1.
        size: elements of the domain, 1 ... 2**62.
        key: from `derive_key`.

    Returns:
        [n] int64, the image of each index.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    result = index.astype(np.uint64)
    # The network permutes 0 ... 4**half_bits - 1, at most 4 * size - 1: follow its cycle until it is below size.
    walking = np.arange(len(result))
    while len(walking):
        value = result[walking]
        left, right = value >> shift, value & mask
        for round_key in key:
            mixed = right + round_key
            mixed = (mixed ^ (mixed >> np.uint64(30))) * _MULTIPLIER_1
            mixed = (mixed ^ (mixed >> np.uint64(27))) * _MULTIPLIER_2
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        value = (left << shift) | right
        result[walking] = value
        walking = walking[value >= np.uint64(size)]
    return result.astype(np.int64)


def choose_positions(length: int, count: int, key: np.ndarray) -> np.ndarray:
    """Choose `count` different positions in 0 ... length - 1, [count] int64: the tokens that objective=mlm masks."""
    return permute(np.arange(count, dtype=np.int64), length, key)


def apportion(weights: Sequence[float], slots: int) -> list[int]:
    """Split `slots` in proportion to the weights by the largest-remainder method, with at least one slot for each.

    Raises:
        ValueError: there are fewer slots than weights.
    """
    if len(weights) > slots:
        raise ValueError(f"{slots} slots for {len(weights)} sources")
    quotas = [weight / sum(weights) * slots for weight in weights]
    counts = [max(1, int(quota)) for quota in quotas]
    while sum(counts) != slots:
        # If slots are left, the largest remainder gets one. If raising some to one took too many, the smallest gives.
        step = 1 if sum(counts) < slots else -1
        able = [i for i in range(len(counts)) if step > 0 or counts[i] > 1]
        chosen = max(able, key=lambda i: step * (quotas[i] - counts[i]))
        counts[chosen] += step
    return counts


@dataclass(frozen=True)
class SourceSize:
    """The name and size of a source."""

    name: str
    num_sequences: int


class SequenceOrder:
    """A map from global positions to sequences.

    Attributes:
        num_sequences: sequences of all sources together; without weights, exactly one epoch.
        shares: for each source name, its fraction of the positions.
    """

    def __init__(self, sources: Sequence[SourceSize], weights: dict[str, float] | None, seed: int) -> None:
        """Create the order of `sources`, each of which must have at least one sequence.

        Raises:
            ValueError: there is no source, a source has no sequence, or the weights name other sources.
        """
        if not sources or any(source.num_sequences < 1 for source in sources):
            raise ValueError("the order needs sources of at least one sequence each")
        if weights is not None and set(weights) != {source.name for source in sources}:
            raise ValueError(f"weights for {sorted(weights)}, sources are {sorted(s.name for s in sources)}")
        self._seed = seed
        # Each pool has one permutation. It is all sources together, or one source if they are mixed by weight.
        pools = [[i] for i in range(len(sources))] if weights else [list(range(len(sources)))]
        self._pool_names = ["\n".join(sources[i].name for i in pool) for pool in pools]
        self._pool_sources = [np.array(pool, dtype=np.int64) for pool in pools]
        sizes = [np.array([sources[i].num_sequences for i in pool], dtype=np.int64) for pool in pools]
        self._pool_ends = [np.cumsum(size) for size in sizes]
        self.num_sequences = int(sum(ends[-1] for ends in self._pool_ends))
        if weights:
            slots = max(_PATTERN_SLOTS, len(pools))
            self._counts = np.array(apportion([weights[source.name] for source in sources], slots), dtype=np.int64)
        else:
            self._counts = np.ones(1, dtype=np.int64)
        self._pattern, self._before = _make_pattern(self._counts, seed)
        pool_shares = self._counts / len(self._pattern)
        self.shares: dict[str, float] = {
            sources[i].name: float(pool_shares[p] * sizes[p][k] / sizes[p].sum())
            for p, pool in enumerate(pools)
            for k, i in enumerate(pool)
        }

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the sequence at each position.

        Args:
            positions: [n] int64, each at least 0; positions beyond one epoch continue into the next one.

        Returns:
            Two arrays [n] int64: the source, as its index in the list given, and the number of the sequence in it.
        """
        cycles, slots = np.divmod(positions.astype(np.int64), len(self._pattern))
        pools = self._pattern[slots]
        taken = cycles * self._counts[pools] + self._before[slots]  # sequences of the pool before this one
        source = np.empty_like(taken)
        sequence = np.empty_like(taken)
        for pool in np.unique(pools):
            ends = self._pool_ends[pool]
            size = int(ends[-1])
            for epoch in np.unique(taken[pools == pool] // size):
                here = np.flatnonzero((pools == pool) & (taken // size == epoch))
                key = derive_key("epoch", self._seed, self._pool_names[pool], int(epoch))
                index = permute(taken[here] - epoch * size, size, key)
                member = np.searchsorted(ends, index, side="right")
                source[here] = self._pool_sources[pool][member]
                sequence[here] = index - np.concatenate(([0], ends))[member]
        return source, sequence


def _make_pattern(counts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pool of each slot, and how many earlier slots have the same pool; both [slots] int64."""
    slots = int(counts.sum())
    shuffled = permute(np.arange(slots, dtype=np.int64), slots, derive_key("pattern", seed))
    pattern = np.repeat(np.arange(len(counts)), counts)[shuffled]
    before = np.zeros(slots, dtype=np.int64)
    for pool in range(len(counts)):
        here = pattern == pool
        before[here] = np.arange(here.sum())
    return pattern.astype(np.int64), before
