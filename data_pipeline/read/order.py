"""The training order: which sequence is at global position n. Pure arithmetic, no state, no I/O.

The result depends only on the sizes of the sources, their weights, the seed and n; in particular, it does not depend
on the number of ranks. The number of consumed sequences is therefore the whole state of the data during training.

Weighted sources are mixed as mix.py says, which also tells how many sequences a source contributed before n. Within a
source, each epoch is a permutation by a keyed Feistel network, which visits every sequence exactly once in constant
memory. Without weights, all sources form one pool, and one epoch of the pool is one pass over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from biroute.data_pipeline.read.mix import Mix
from biroute.data_pipeline.read.permutation import derive_key, permute


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
            ValueError: there is no source, a source has no sequence, the weights name other sources, or one is too
                small.
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
        self._mix = Mix([weights[source.name] for source in sources], seed) if weights else None
        pool_shares = self._mix.shares if self._mix else np.ones(1)
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
        positions = positions.astype(np.int64)
        # The pool of each position, and how many sequences of the pool come before it.
        pools, taken = self._mix.locate(positions) if self._mix else (np.zeros_like(positions), positions)
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
