"""The order of training: permutations, mixing, and independence from the number of ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biroute.data_pipeline.read.loader import StepShape
from biroute.data_pipeline.read.order import SequenceOrder, SourceSize
from biroute.data_pipeline.read.permutation import choose_positions, derive_key, permute

Pairs = list[tuple[int, int]]
GOLDEN_MIXED = [(1, 47), (1, 17), (1, 49), (1, 20), (1, 40), (0, 55)]
GOLDEN_POOLED = [(0, 4), (0, 67), (1, 18), (0, 75), (1, 13), (0, 64)]


def located(order: SequenceOrder, begin: int, end: int) -> Pairs:
    sources, sequences = order.locate(np.arange(begin, end))
    return list(zip(sources.tolist(), sequences.tolist(), strict=True))


@settings(max_examples=120)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40))
def test_permutation_is_a_bijection(size: int, seed: int) -> None:
    image = permute(np.arange(size), size, derive_key(seed))
    assert sorted(image.tolist()) == list(range(size))
    some = np.arange(size)[:: max(1, size // 7)]
    np.testing.assert_array_equal(permute(some, size, derive_key(seed)), image[some])  # one by one or all at once


@given(size=st.integers(2**31, 2**62), index=st.integers(0, 2**31 - 2))
def test_permutation_of_a_huge_domain_stays_inside(size: int, index: int) -> None:
    image = permute(np.array([index, size - 1]), size, derive_key("huge"))
    assert (image >= 0).all()
    assert (image < size).all()
    assert image[0] != image[1]


def test_permutations_of_a_tiny_domain_are_about_equally_likely() -> None:
    seen = Counter(tuple(permute(np.arange(4), 4, derive_key("tiny", seed)).tolist()) for seed in range(4800))
    assert len(seen) == 24
    # 200 each is expected; chi-squared of 23 degrees of freedom exceeds 60 once in 30,000 times.
    assert sum((count - 200) ** 2 / 200 for count in seen.values()) < 60


def test_the_order_of_a_seed_never_changes() -> None:
    # Golden: a run that resumes with a newer version must see the same sequences.
    order = SequenceOrder([SourceSize("a", 100), SourceSize("b", 50)], {"a": 1.0, "b": 3.0}, seed=7)
    assert located(order, 0, 6) == GOLDEN_MIXED
    assert located(SequenceOrder([SourceSize("a", 100), SourceSize("b", 50)], None, 7), 0, 6) == GOLDEN_POOLED


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
    epoch=st.integers(0, 3),
)
def test_without_weights_an_epoch_is_every_sequence_once(sizes: list[int], seed: int, epoch: int) -> None:
    order = SequenceOrder([SourceSize(f"s{i}", size) for i, size in enumerate(sizes)], None, seed)
    assert order.num_sequences == sum(sizes)
    found = located(order, epoch * sum(sizes), (epoch + 1) * sum(sizes))
    assert sorted(found) == [(i, n) for i, size in enumerate(sizes) for n in range(size)]


def test_epochs_and_seeds_differ() -> None:
    def first(seed: int, begin: int) -> Pairs:
        return located(SequenceOrder([SourceSize("a", 200)], None, seed), begin, begin + 200)

    assert first(0, 0) != first(0, 200)
    assert first(0, 0) != first(1, 0)


@settings(max_examples=15)
@given(weights=st.lists(st.floats(0.01, 100), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_shares_follow_the_weights_and_each_source_goes_through_its_epochs(weights: list[float], seed: int) -> None:
    sizes = [90 + 200 * i for i in range(len(weights))]
    names = [f"s{i}" for i in range(len(weights))]
    order = SequenceOrder(
        [SourceSize(name, size) for name, size in zip(names, sizes, strict=True)],
        dict(zip(names, weights, strict=True)),
        seed,
    )
    total = 2 * 4096
    found = located(order, 0, total)
    for i, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        mine = [sequence for source, sequence in found if source == i]
        share = len(mine) / total
        assert order.shares[names[i]] == pytest.approx(weight / sum(weights), rel=1e-9)
        assert share == pytest.approx(weight / sum(weights), abs=3 / total)
        for epoch in range(len(mine) // size):
            assert sorted(mine[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_shares_hold_within_a_short_run() -> None:
    order = SequenceOrder([SourceSize("a", 5000), SourceSize("b", 5000)], {"a": 0.8, "b": 0.2}, 3)
    for begin in (0, 1000, 123_456):
        share = sum(source == 0 for source, _ in located(order, begin, begin + 1000)) / 1000
        assert share == pytest.approx(0.8, abs=0.065)  # five standard deviations


@settings(max_examples=60)
@given(data=st.data())
def test_changing_the_number_of_ranks_in_mid_epoch_keeps_exactly_once(data: st.DataObject) -> None:
    size = data.draw(st.integers(150, 400))
    order = SequenceOrder([SourceSize("a", size // 3), SourceSize("b", size - size // 3)], None, 5)
    position, seen = 0, Counter[tuple[int, int]]()
    while position + 24 <= size:
        data_size = data.draw(st.sampled_from([1, 2, 3, 4]))
        shapes = [StepShape(24, data.draw(st.sampled_from([1, 2])), 0, data_size)]
        shapes = [StepShape(24, shapes[0].microbatch_size, rank, data_size) for rank in range(data_size)]
        step = [shape.positions(position, m) for shape in shapes for m in range(shape.num_microbatches)]
        assert sorted(np.concatenate(step).tolist()) == list(range(position, position + 24))
        sources, sequences = order.locate(np.concatenate(step))
        seen.update(zip(sources.tolist(), sequences.tolist(), strict=True))
        position += 24
    rest = located(order, position, size)
    assert set(seen.values()) == {1}
    assert len(seen) + len(rest) == size
    assert not set(seen) & set(rest)


@given(length=st.integers(2, 300), share=st.floats(0, 1), n=st.integers(0, 10**9))
def test_chosen_positions_are_distinct(length: int, share: float, n: int) -> None:
    count = int(share * length)
    chosen = choose_positions(length, count, derive_key("mask", 0, n))
    assert len(set(chosen.tolist())) == count
    assert all(0 <= position < length for position in chosen.tolist())


def test_chosen_positions_cover_the_sequence_evenly() -> None:
    counts = np.zeros(50)
    for n in range(2000):
        counts[choose_positions(50, 10, derive_key("mask", 0, n))] += 1
    assert abs(counts - 400).max() < 100  # five and a half standard deviations


def test_steps_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        StepShape(10, 2, 0, 3)
