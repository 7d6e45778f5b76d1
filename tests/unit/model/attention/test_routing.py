"""Level one: the choice of regions against plain loops, ties, shards, the random and the local route."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from biroute.model.attention import reference, routing
from biroute.model.attention.routing import key_descriptors, query_descriptors, route_regions, sliding_window_route
from biroute.model.attention.rule import RouteRule


@st.composite
def route_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict]:
    """q, k and the keyword arguments of route_regions."""
    region_size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    divisors = st.sampled_from([n for n in range(1, region_size + 1) if region_size % n == 0])
    block, parts = draw(divisors), draw(divisors)
    regions, rep, groups = draw(st.integers(1, 7)), draw(st.integers(1, 4)), draw(st.integers(1, 2))
    causal = draw(st.booleans())
    forced = {
        "force_own": causal or draw(st.booleans()),
        "force_previous": draw(st.booleans()),
        "attention_sink": draw(st.booleans()),
    }
    topk = draw(st.integers(max(1, sum(forced.values())), regions + 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, tokens, size = draw(st.integers(1, 2)), region_size * regions, draw(st.sampled_from([1, 4, 8]))
    q = torch.randn(batch, groups * rep, tokens, size, generator=generator)
    k = torch.randn(batch, groups, tokens, size, generator=generator)
    sizes = {"region_size": region_size, "query_block_size": block, "descriptors_per_region": parts}
    return q, k, dict(topk=topk, causal=causal, **sizes, **forced)


@settings(max_examples=60)
@given(route_cases())
def test_route_equals_plain_loops(case: tuple[Tensor, Tensor, dict]) -> None:
    q, k, kwargs = case
    route = route_regions(q, k, RouteRule(**kwargs))
    assert route.dtype == torch.int64
    assert torch.equal(route, reference.route_regions(q, k, RouteRule(**kwargs)))


@settings(max_examples=40)
@given(route_cases(), st.sampled_from(["affinity", "random"]))
def test_route_holds_what_is_forced_and_nothing_from_the_future(case, router: str) -> None:
    q, k, kwargs = case
    route = route_regions(q, k, RouteRule(router=router, seed=5, **kwargs))
    num_regions = k.shape[2] // kwargs["region_size"]
    for i, rows in enumerate(route.transpose(0, 2).flatten(1, 2)):
        own = i * kwargs["query_block_size"] // kwargs["region_size"]
        for row in rows.tolist():
            chosen = [j for j in row if j >= 0]
            assert row == sorted(set(chosen)) + [-1] * (len(row) - len(chosen))
            available = set(range(own + 1 if kwargs["causal"] else num_regions))
            forced = {own} if kwargs["force_own"] else set()
            forced |= {own - 1} if kwargs["force_previous"] and own else set()
            forced |= {0} if kwargs["attention_sink"] else set()
            assert forced <= set(chosen) <= available
            assert len(chosen) == min(kwargs["topk"], len(available))


@pytest.mark.parametrize("causal", [True, False])
def test_exact_ties_go_to_the_lower_region(causal: bool) -> None:
    # Every region has one of three descriptors, so most affinities are equal to others, bit for bit.
    region_size, num_regions, topk = 4, 200, 9
    kind_R = torch.randint(0, 3, (num_regions,), generator=torch.Generator().manual_seed(0))
    k = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))[kind_R]
    k = k.repeat_interleave(region_size, 0)[None, None]
    q = torch.randn(1, 2, num_regions * region_size, 16, generator=torch.Generator().manual_seed(2))
    kwargs = {"region_size": region_size, "query_block_size": 2, "topk": topk, "causal": causal}
    route = route_regions(q, k, RouteRule(**kwargs))
    assert torch.equal(route, reference.route_regions(q, k, RouteRule(**kwargs)))


def test_all_equal_affinities_choose_the_first_regions() -> None:
    route = route_regions(
        torch.zeros(1, 1, 64, 4),
        torch.zeros(1, 1, 64, 4),
        RouteRule(region_size=4, query_block_size=4, topk=5, causal=True),
    )
    assert route[0, 0, 10].tolist() == [0, 1, 2, 9, 10]
    assert route[0, 0, 2].tolist() == [0, 1, 2, -1, -1]


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("chunk", [1, 100, 777, 10**9])
def test_chunk_size_does_not_change_the_route(monkeypatch: pytest.MonkeyPatch, chunk: int, parts: int) -> None:
    generator = torch.Generator().manual_seed(3)
    # Few distinct values: many near and exact ties.
    q = torch.randint(-2, 3, (1, 4, 512, 8), generator=generator) / 3
    k = torch.randint(-2, 3, (1, 2, 512, 8), generator=generator) / 3
    kwargs = {"region_size": 8, "query_block_size": 1, "topk": 6, "causal": True, "descriptors_per_region": parts}
    expected = route_regions(q, k, RouteRule(**kwargs))
    monkeypatch.setattr(routing, "CHUNK_AFFINITIES", (chunk, chunk))
    assert torch.equal(route_regions(q, k, RouteRule(**kwargs)), expected)


@pytest.mark.parametrize("router", ["affinity", "random"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("shards", "n"), [(2, 1), (8, 1), (8, 4)])
def test_a_shard_chooses_like_the_whole(router: str, causal: bool, shards: int, n: int) -> None:
    generator = torch.Generator().manual_seed(4)
    q = torch.randint(-2, 3, (2, 4, 256, 8), generator=generator) / 3
    k = torch.randint(-2, 3, (2, 2, 256, 8), generator=generator) / 3
    rule = RouteRule(8, 2, topk=6, causal=causal, router=router, seed=1, descriptors_per_region=n)
    whole = routing.route_query_blocks(q, key_descriptors(k, 8, n), rule)
    # A rank holds strided views of its own tokens and all descriptors, gathered.
    q_parts, k_parts = q.chunk(shards, 2), k.chunk(shards, 2)
    gathered = torch.cat([key_descriptors(part, 8, n) for part in k_parts], 2)
    parts = [
        routing.route_query_blocks(part, gathered, rule, first_token=i * 256 // shards)
        for i, part in enumerate(q_parts)
    ]
    assert torch.equal(torch.cat(parts, 2), whole)
    # A tensor-parallel rank holds some of the key/value heads.
    groups = [
        routing.route_query_blocks(q[:, 2 * g : 2 * g + 2], gathered[:, g : g + 1], rule, first_kv_head=g)
        for g in range(2)
    ]
    assert torch.equal(torch.cat(groups, 1), whole)


def test_random_route_depends_on_each_counter_and_looks_uniform() -> None:
    q, k = torch.zeros(2, 2, 1024, 4), torch.zeros(2, 2, 1024, 4)
    kwargs = {
        "region_size": 16,
        "query_block_size": 1,
        "topk": 8,
        "causal": False,
        "force_own": False,
        "force_previous": False,
    }
    route = route_regions(q, k, RouteRule(router="random", seed=0, **kwargs))
    assert torch.equal(route, route_regions(q + 1, k - 1, RouteRule(router="random", seed=0, **kwargs)))
    assert torch.equal(route[0], route[1])
    assert not torch.equal(route[:, 0], route[:, 1])
    assert not torch.equal(route[:, :, :1], route[:, :, 1:2])
    assert not torch.equal(route, route_regions(q, k, RouteRule(router="random", seed=1, **kwargs)))
    count = torch.bincount(route[0].flatten(), minlength=64).double()
    # 64 regions, 256 hits expected in each, standard deviation below 16: five of them.
    assert (count - 256).abs().max() < 80


def test_descriptors_are_what_they_say() -> None:
    q, k = torch.randn(2, 6, 24, 5), torch.randn(2, 3, 24, 5)
    keys = key_descriptors(k.bfloat16(), 8)
    assert keys.dtype == torch.float32
    assert keys.shape == (2, 3, 3, 5)
    torch.testing.assert_close(keys[1, 2, 1], k.bfloat16()[1, 2, 8:16].float().mean(0))
    parts = key_descriptors(k, 8, 4)
    assert parts.shape == (2, 3, 12, 5)
    torch.testing.assert_close(parts[1, 2, 6], k[1, 2, 12:14].mean(0))  # of region 1 the third of four
    causal, whole = query_descriptors(q, 3, 4, True), query_descriptors(q, 3, 4, False)
    assert causal.shape == whole.shape == (2, 3, 6, 5)
    torch.testing.assert_close(causal[1, 2, 3], q[1, 4:6, 12].mean(0))
    torch.testing.assert_close(whole[1, 2, 3], q[1, 4:6, 12:16].mean((0, 1)))


def test_one_near_key_among_far_ones_is_found_by_its_own_descriptor() -> None:
    """Ones and minus ones cancel in a mean over four keys, not in one over a single key."""
    q, k = torch.ones(1, 1, 64, 4), torch.full((1, 1, 64, 4), 0.1)
    k[0, 0, 12:16] = torch.tensor([3.0, -1.0, -1.0, -1.0])[:, None]
    kwargs = {"region_size": 4, "query_block_size": 1, "topk": 3, "causal": True}
    assert route_regions(q, k, RouteRule(**kwargs))[0, 0, 40].tolist() == [0, 9, 10]
    assert route_regions(q, k, RouteRule(descriptors_per_region=4, **kwargs))[0, 0, 40].tolist() == [3, 9, 10]


def test_choice_carries_no_gradient() -> None:
    q, k = torch.randn(1, 1, 16, 4, requires_grad=True), torch.randn(1, 1, 16, 4, requires_grad=True)
    assert not key_descriptors(k, 4).requires_grad
    assert not query_descriptors(q, 1, 4, False).requires_grad
    assert not route_regions(q, k, RouteRule(region_size=4, query_block_size=1, topk=2, causal=True)).requires_grad


def test_a_diverged_model_still_gets_a_legal_route() -> None:
    q, k = torch.randn(1, 1, 64, 4), torch.randn(1, 1, 64, 4)
    q[0, 0, 20:], k[0, 0, 7], k[0, 0, 30] = torch.nan, torch.inf, 1e38
    route = route_regions(q, k, RouteRule(region_size=4, query_block_size=1, topk=3, causal=True))
    own = torch.arange(64) // 4
    assert (route == own[:, None]).any(-1).all()
    assert route.max() <= 15
    assert ((route >= 0).sum(-1) == (own + 1).clamp(max=3)).all()


def test_sliding_window_route() -> None:
    size = {"batch": 2, "kv_heads": 3, "num_tokens": 40, "region_size": 4, "query_block_size": 2}
    causal = sliding_window_route(**size, topk=3, causal=True)
    assert causal.shape == (2, 3, 20, 3)
    assert causal[1, 2, 1].tolist() == [0, -1, -1]
    assert causal[1, 2, 13].tolist() == [4, 5, 6]
    centred = sliding_window_route(**size, topk=3, causal=False)
    assert centred[0, 0, 0].tolist() == [0, 1, 2]
    assert centred[0, 0, 13].tolist() == [5, 6, 7]
    assert centred[0, 0, 19].tolist() == [7, 8, 9]
    assert sliding_window_route(**size, topk=12, causal=False)[0, 0, 5].tolist() == [*range(10), -1, -1]
    even = sliding_window_route(**size, topk=4, causal=False)
    assert even[0, 0, 13].tolist() == [4, 5, 6, 7]  # own region 6: one more before than after
    assert even[0, 0, 0].tolist() == [0, 1, 2, 3]
    shard = sliding_window_route(
        **(size | {"num_tokens": 20}), topk=3, causal=False, first_token=20, sequence_length=40
    )
    assert torch.equal(shard, centred[:, :, 10:])


@pytest.mark.parametrize("change", [{"num_tokens": 15}, {"sequence_length": 18}, {"first_token": 1}], ids=str)
def test_a_window_over_half_a_block_is_refused(change: dict[str, int]) -> None:
    sizes = {"num_tokens": 16, "sequence_length": 16, "first_token": 0} | change
    with pytest.raises(ValueError, match="is not a whole number of blocks"):
        sliding_window_route(batch=1, kv_heads=1, region_size=4, query_block_size=2, topk=2, causal=True, **sizes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_block_size": 3}, "query_block_size=3 does not divide region_size=4"),
        ({"descriptors_per_region": 3}, "descriptors_per_region=3 does not divide region_size=4"),
        ({"force_own": False}, "a causal token must see itself"),
        ({"topk": 1}, "topk=1 leaves no room for 2 forced regions"),
        ({"region_size": 6, "query_block_size": 2}, "region_size=6 does not divide the 16 tokens"),
        ({"router": "best"}, "router='best' is unknown"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    kwargs = {"region_size": 4, "query_block_size": 2, "topk": 3, "causal": True} | change
    with pytest.raises(ValueError, match=message):
        route_regions(torch.randn(1, 1, 16, 4), torch.randn(1, 1, 16, 4), RouteRule(**kwargs))


def test_a_descriptor_is_the_exact_mean_rounded_once() -> None:
    """Summed in fp64: in fp32 a small key between two large ones is lost, and the memory layout counts."""
    k = torch.zeros(1, 1, 4, 3)
    k[0, 0, :, 0] = torch.tensor([1e8, 1.0, -1e8, 1.0])
    assert key_descriptors(k, 4)[0, 0, 0, 0] == 0.5
    assert query_descriptors(k, 1, 4, False)[0, 0, 0, 0] == 0.5
    k = torch.randn(2, 2, 256, 7)
    exact = k.double().unflatten(2, (4, 64)).mean(3).float()
    assert torch.equal(key_descriptors(k, 64), exact)
    assert torch.equal(key_descriptors(k.transpose(1, 2).contiguous().transpose(1, 2), 64), exact)


@pytest.mark.parametrize("field", ["causal", "force_own", "force_previous", "attention_sink", "topk"])
def test_every_rule_changes_the_route(field: str) -> None:
    """Against the reference with the same field, and unlike the route without it."""
    base = {"region_size": 4, "query_block_size": 1, "topk": 4, "causal": False, "force_own": False,
            "force_previous": False, "attention_sink": False}  # fmt: skip
    changed = base | (
        {"causal": True, "force_own": True}
        if field == "causal"
        else {"topk": 5}
        if field == "topk"
        else {field: True}
    )
    q, k = torch.randn(1, 2, 64, 8), torch.randn(1, 1, 64, 8)
    route = route_regions(q, k, RouteRule(**changed))
    assert torch.equal(route, reference.route_regions(q, k, RouteRule(**changed)))
    before = route_regions(q, k, RouteRule(**base))
    assert route.shape != before.shape or not torch.equal(route, before)
