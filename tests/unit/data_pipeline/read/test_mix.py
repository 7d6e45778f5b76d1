"""The mix of weighted sources: exact in the long run, for any weights and any number of sources."""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biroute.configs.errors import UsageError
from biroute.configs.load import config_from_tree
from biroute.data_pipeline.read.mix import BLOCK, Mix


@cache
def van_der_corput(n: int) -> Fraction:
    """Point n, from the definition: the binary digits of n, mirrored at the point."""
    point, unit = Fraction(0), Fraction(1, 2)
    while n:
        point, n, unit = point + (n & 1) * unit, n >> 1, unit / 2
    return point


@settings(max_examples=6, deadline=None)
@given(weights=st.lists(st.sampled_from([1e-6, 1e-3, 0.1, 1.0, 3.0]), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_a_block_holds_the_points_of_its_positions(weights: list[float], seed: int) -> None:
    """Against the definition, point by point; only the order within a block is another."""
    mix = Mix(weights, seed)
    ends = [sum(map(Fraction, weights[: i + 1])) / sum(map(Fraction, weights)) for i in range(len(weights))]
    for begin in (0, BLOCK):
        points = [van_der_corput(n) for n in range(begin, begin + BLOCK)]
        expected = [sum(point >= end for end in ends) for point in points]
        found, _ = mix.locate(np.arange(begin, begin + BLOCK))
        assert np.bincount(found, minlength=len(weights)).tolist() == [expected.count(i) for i in range(len(weights))]


MANY = [1.0] * 5000
STEEP = [1 / i**1.2 for i in range(1, 1001)]
TINY = [1.0, 1e-6, 1e-6]


@pytest.mark.parametrize("weights", [TINY, STEEP, MANY, [0.7, 0.3]], ids=["tiny", "steep", "many", "two"])
def test_the_count_before_a_position_is_that_of_the_positions_before(weights: list[float]) -> None:
    mix, seen = Mix(weights, 3), np.zeros(len(weights), dtype=np.int64)
    for block in range(5):
        sources, before = mix.locate(np.arange(block * BLOCK, (block + 1) * BLOCK))
        for source, count in zip(sources.tolist(), before.tolist(), strict=True):
            assert count == seen[source]
            seen[source] += 1


@pytest.mark.parametrize("weights", [TINY, STEEP, MANY, [0.7, 0.3]], ids=["tiny", "steep", "many", "two"])
@pytest.mark.parametrize("positions", [BLOCK * 7, BLOCK * 1_000_003, 2**44])
def test_every_weight_is_kept_in_the_long_run(weights: list[float], positions: int) -> None:
    """The counts before a far position, without walking there: each is off by a logarithm and not by a share."""
    mix = Mix(weights, 3)
    sources, before = mix.locate(np.arange(positions, positions + 64 * BLOCK))
    for source in np.unique(sources)[:200]:
        count = before[sources == source][0]  # just before the first position of that source from here on
        expected = weights[source] / sum(weights) * positions
        assert abs(count - expected) < 2 + np.log2(positions), (source, count, expected)
    np.testing.assert_allclose(mix.shares, np.array(weights) / sum(weights), rtol=1e-8)


def test_neighbours_do_not_follow_a_rhythm() -> None:
    """Of two equal sources, the even positions get each in half of the cases, not one of them always."""
    sources, _ = Mix([1.0, 1.0], 0).locate(np.arange(4 * BLOCK))
    assert abs(sources[::2].mean() - 0.5) < 0.03
    assert (Mix([1.0, 1.0], 1).locate(np.arange(100))[0] != sources[:100]).any(), "the seed does not matter"


def test_a_weight_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="weight 1e-20 is too small beside the others"):
        Mix([1.0, 1e-20], 0)
    tree = [{"name": name, "paths": ["x.txt"], "weight": weight} for name, weight in (("a", 1.0), ("b", 1e-20))]
    with pytest.raises(UsageError, match=r"weight 1e-20 is too small beside a sum of 1\.0; leave the source out"):
        config_from_tree({"data": {"sources": tree}}, "test")
