"""The mix: which source is at global position n, and how many positions before n it had. Arithmetic, no state.

A weight is an interval of [0, 1), and the source of a position is the one whose interval holds the position's point.
The points are a van der Corput sequence (in base 2, J. G. van der Corput, 1935): 0, 1/2, 1/4, 3/4, 1/8 ... Of its
first n points, an interval of length w holds w * n up to a logarithm of n, for every w and n, and their exact number
follows from the binary digits of n. So every weight is kept in the long run, however small and among however many,
and a run can begin at any position.

Blocks of 4,096 positions are shuffled, so that the alternation of sources does not follow the rhythm of the batches.
Whoever changes the order raises MIX_VERSION in configs/changes.py, by which a checkpoint knows its order.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

import numpy as np

from biroute.data_pipeline.read.permutation import derive_key, permute

_BLOCK_BITS = 12
_BLOCK_COUNT_BITS = 40  # a mix has 2**52 positions, a thousand times what any run consumes
_POINTS_BITS = _BLOCK_BITS + _BLOCK_COUNT_BITS
BLOCK = 1 << _BLOCK_BITS


class Mix:
    """The mix of sources by weight.

    Attributes:
        shares: [sources] float64, the exact fraction of each in the long run.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        """Divide [0, 1) among the weights, in steps of 2**-52.

        Raises:
            ValueError: a weight is not positive or is too small beside the others to have a step of its own.
        """
        sums = list(accumulate(Fraction(weight) for weight in weights))
        self._ends = np.array([round(end / sums[-1] * (1 << _POINTS_BITS)) for end in sums], dtype=np.int64)
        self._begins = np.concatenate(([0], self._ends[:-1]))
        if (self._ends <= self._begins).any():
            raise ValueError(f"weight {min(weights)} is too small beside the others, whose sum is {float(sums[-1])}")
        self._seed = seed
        self.shares = (self._ends - self._begins) / float(1 << _POINTS_BITS)
        self._block = lru_cache(maxsize=4)(self._make_block)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the source of each position, and how many of the positions before have the same source.

        Args:
            positions: [n] int64, each in 0 ... 2**52 - 1.

        Returns:
            Two arrays [n] int64.
        """
        source, taken = np.empty_like(positions), np.empty_like(positions)
        blocks = positions >> _BLOCK_BITS
        for block in np.unique(blocks):
            here = blocks == block
            sources, before = self._block(int(block))
            slots = positions[here] & (BLOCK - 1)
            source[here], taken[here] = sources[slots], before[slots]
        return source, taken

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each slot of a block, and its count before the slot; both [BLOCK] int64."""
        offset = int(_reversed_bits(np.array([block]))[0])
        points = (np.arange(BLOCK, dtype=np.int64) << _BLOCK_COUNT_BITS) + offset
        shuffled = permute(np.arange(BLOCK), BLOCK, derive_key("mix", self._seed, block))
        sources = np.searchsorted(self._ends, points, side="right")[shuffled]
        by_source = np.argsort(sources, kind="stable")
        first = np.searchsorted(sources[by_source], sources[by_source], side="left")
        rank = np.empty(BLOCK, dtype=np.int64)
        rank[by_source] = np.arange(BLOCK) - first  # among the block's slots of the same source
        earlier = _points_below(self._ends, block) - _points_below(self._begins, block)
        return sources, earlier[sources] + rank


def _points_below(bound: np.ndarray, blocks: int) -> np.ndarray:
    """Count the points of the first `blocks` blocks that are below each bound (of 0 ... 2**52), [n] int64.

    A block has the points t * 2**40 + r, with t from 0 to 4,095 and r the reversed bits of its number. So t < bound
    >> 40 are all below, and the next one is if r is below the rest of the bound. The numbers below `blocks` fall into
    one range of 2**j numbers for each binary digit j that is 1; their reversed bits are evenly spaced.
    """
    whole, rest = bound >> _BLOCK_COUNT_BITS, bound & ((1 << _BLOCK_COUNT_BITS) - 1)
    count = whole * blocks
    for j in range(_BLOCK_COUNT_BITS):
        if blocks >> j & 1:
            first = int(_reversed_bits(np.array([blocks >> (j + 1) << (j + 1)]))[0])
            shift = _BLOCK_COUNT_BITS - j
            count += np.clip((rest - first + (1 << shift) - 1) >> shift, 0, 1 << j)
    return count


def _reversed_bits(number: np.ndarray) -> np.ndarray:
    """Reverse the order of the lowest 40 binary digits, [n] int64."""
    result = np.zeros_like(number)
    for j in range(_BLOCK_COUNT_BITS):
        result |= ((number >> j) & 1) << (_BLOCK_COUNT_BITS - 1 - j)
    return result
