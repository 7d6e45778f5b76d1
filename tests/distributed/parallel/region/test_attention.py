"""Attention over sharded regions equals one process: outputs, gradients, routes, causality, and bytes as planned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers.pool import WorkerPool
from helpers.regions import Case
from torch import Tensor

from biroute.model.attention import reference
from biroute.model.attention.bi_level import bi_level_attention, dense_attention
from biroute.model.attention.grid import RegionGrid
from biroute.model.attention.key_smear import KeySmear
from biroute.model.attention.routing import key_descriptors, route_query_blocks, route_regions, sliding_window_route
from biroute.model.attention.rule import RouteRule
from biroute.parallel.region import attention as region_attention
from biroute.parallel.region.costs import RegionLayout
from biroute.parallel.region.shard import RegionShard
from biroute.parallel.region.transport import Pending, Transport

Ranks = Callable[[int], WorkerPool]


def inputs(case: Case, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k, v and the gradient of the output for the whole sequence."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, heads, case.tokens, 8) for heads in (case.heads, case.groups, case.groups, case.heads)]
    q, k, v, dout = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    k[:, :, : case.region_size] += case.skew * q.mean((1, 2), keepdim=True)
    if case.distinct:
        kept = k[:, :, : case.distinct * case.region_size]
        k = kept.repeat(1, 1, case.num_regions // case.distinct, 1)
    return tuple(x.to(case.dtype) for x in (q, k, v, dout))


def single(case: Case, in_fp64: bool = False) -> tuple[Tensor, ...]:
    """Index, output and gradients of one process, of the same inputs."""
    q, k, v, dout = (x.double() if in_fp64 else x for x in inputs(case))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    if case.kind == "dense":
        route, out = torch.empty(0), dense_attention(q, k, v, causal=case.causal)
    else:
        route = whole_route(case, q, k)
        out = bi_level_attention(
            q, k, v, route, region_size=case.region_size, query_block_size=case.query_block_size, causal=case.causal
        )
    return route, out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def whole_route(case: Case, q: Tensor, k: Tensor) -> Tensor:
    sizes = {"region_size": case.region_size, "query_block_size": case.query_block_size, "topk": case.topk}
    if case.kind == "sliding_window":
        return sliding_window_route(
            batch=2, kv_heads=case.groups, num_tokens=case.tokens, causal=case.causal, **sizes
        )
    return route_regions(
        q, k, RouteRule(causal=case.causal, descriptors_per_region=case.descriptors_per_region, **sizes)
    )


def sharded(case: Case, seed: int = 0) -> dict[str, Any]:
    """This rank's part of the same."""
    group = dist.group.WORLD
    layout = RegionLayout(case.num_regions, case.region_size, case.ranks)
    shard = RegionShard(layout, Transport(group), case.way)
    q, k, v, dout = (x.chunk(case.ranks, 2)[group.rank()].clone() for x in inputs(case, seed))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    route = torch.empty(0)
    if case.kind == "dense":
        out = shard.dense_attention(q, k, v, causal=case.causal, layer=0)
    else:
        route = shard_route(case, shard, q, k)
        grid = RegionGrid(case.region_size, case.query_block_size, case.causal, q.shape[3] ** -0.5)
        out = shard.routed_attention(q, k, v, route, grid, 0)
    log = shard.transport.log
    payload = [sum(int(log.received[0, kind].sum()) for kind in ("keys", "results") if (0, kind) in log.received)]
    payload += [sum(int(log.sent[0, kind].sum()) for kind in ("queries",) if (0, kind) in log.sent)]
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    return {
        "values": (route, out.detach(), *gradients),
        "payload": sum(payload),
        "planned": log.planned[0],
        "baselines": log.baselines[0],
        "shipped": int(log.sent[0, "queries"].sum()) if (0, "queries") in log.sent else 0,
    }


def shard_route(case: Case, shard: RegionShard, q: Tensor, k: Tensor) -> Tensor:
    if case.kind == "sliding_window":
        return sliding_window_route(
            batch=2, kv_heads=case.groups, num_tokens=q.shape[2], region_size=case.region_size,
            query_block_size=case.query_block_size, topk=case.topk, causal=case.causal,
            first_token=shard.first_token, sequence_length=case.tokens,
        )  # fmt: skip
    own = key_descriptors(k, case.region_size, case.descriptors_per_region)
    descriptors = shard.all_key_descriptors(own, 0)
    return route_query_blocks(q, descriptors, case.rule, first_token=shard.first_token)


def gathered(answers: list[dict[str, Any]]) -> list[Tensor]:
    """The ranks' parts put together along the tokens."""
    return [torch.cat(parts, 2) for parts in zip(*(answer["values"] for answer in answers), strict=True)]


CASES = [
    Case(2),
    Case(4),
    Case(8),
    Case(2, way="fetch"),
    Case(4, way="fetch"),
    Case(4, way="ship"),
    Case(8, way="ship", skew=3.0),
    Case(4, query_block_size=4),
    Case(8, query_block_size=4, way="ship"),
    Case(4, region_size=8, query_block_size=2, num_regions=12, topk=3),
    Case(4, descriptors_per_region=2),
    Case(8, query_block_size=4, descriptors_per_region=4),
    Case(4, groups=4),
    Case(4, heads=8, groups=1, skew=3.0),
    Case(4, num_regions=12, topk=12),
    Case(4, num_regions=4, topk=2),
    Case(4, causal=False, query_block_size=4),
    Case(4, causal=False, way="ship"),
    Case(4, kind="sliding_window", query_block_size=4, topk=3),
    Case(8, kind="sliding_window", query_block_size=4, topk=7),
    Case(4, kind="sliding_window", query_block_size=4, causal=False),
    Case(2, kind="dense"),
    Case(8, kind="dense"),
    Case(4, kind="dense", causal=False),
    Case(4, region_size=32, topk=4, num_regions=8, heads=8, groups=1),
    Case(4, region_size=1, num_regions=60),
    Case(4, distinct=3),
    Case(8, distinct=2, query_block_size=4, way="ship"),
]


def sharded_job(case: Case) -> dict[str, Any]:
    return sharded(case)


def name_of(case: Case) -> str:
    defaults = Case(0)
    return " ".join(f"{k}={v}" for k, v in vars(case).items() if v != getattr(defaults, k))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_shards_equal_one_process(case: Case, ranks: Ranks) -> None:
    answers = ranks(case.ranks).run(sharded_job, case)
    route, *found = gathered(answers) if case.kind != "dense" else [None, *gathered_dense(answers)]
    expected_route, *expected = single(case)
    if route is not None:
        assert torch.equal(route, expected_route)
    for name, got, want in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        assert (got - want).norm() / want.norm() < 1e-5, name
    for answer in answers:
        assert answer["payload"] == answer["planned"]
        for baseline in answer["baselines"]:
            assert case.way == "ship" or answer["planned"] <= baseline.causal_fetch <= baseline.ring
            assert case.way != "auto" or answer["planned"] <= baseline.bound


@pytest.mark.parametrize("way", ["fetch", "ship"])
def test_the_error_does_not_grow_with_the_ranks(way: str, ranks: Ranks) -> None:
    exact = single(Case(1, num_regions=48), in_fp64=True)
    errors = {}
    for count in (2, 8):
        found = gathered(ranks(count).run(sharded_job, Case(count, num_regions=48, way=way)))
        pairs = zip(found[1:], exact[1:], strict=True)
        errors[count] = max(float((got - want).norm() / want.norm()) for got, want in pairs)
    assert errors[2] < 1e-6
    assert errors[8] < 2 * errors[2], errors


def gathered_dense(answers: list[dict[str, Any]]) -> list[Tensor]:
    return [torch.cat(parts, 2) for parts in list(zip(*(answer["values"] for answer in answers), strict=True))[1:]]


@pytest.mark.parametrize(
    "case", [Case(4), Case(4, query_block_size=4), Case(4, region_size=32, topk=4, num_regions=8)]
)
def test_the_way_changes_no_bit(case: Case, ranks: Ranks) -> None:
    ways = [gathered(ranks(case.ranks).run(sharded_job, Case(**{**vars(case), "way": w}))) for w in ("fetch", "ship")]
    different = {
        name: float((fetched - shipped).abs().max())
        for name, fetched, shipped in zip(("route", "out", "dq", "dk", "dv"), *ways, strict=True)
        if not torch.equal(fetched, shipped)
    }
    assert not different


def smeared_job(num_ranks: int, tokens: int) -> tuple[Tensor, ...]:
    """This rank's smeared keys, the gradient of its keys, and its part of the gradient of the shares."""
    group = dist.group.WORLD
    shard = RegionShard(RegionLayout(num_ranks, tokens // num_ranks, num_ranks), Transport(group))
    k, upstream = (x.chunk(num_ranks, 2)[group.rank()].clone() for x in smear_inputs(tokens))
    smear = KeySmear(3, 5).double()
    k.requires_grad_()
    out = smear(k, shard.key_before(k, 0))
    return out.detach(), *torch.autograd.grad(out, (k, smear.share), upstream)


def smear_inputs(tokens: int) -> Tensor:
    return torch.randn(2, 2, 3, tokens, 5, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


@pytest.mark.parametrize(("num_ranks", "tokens"), [(2, 24), (4, 24), (8, 8)])
def test_smeared_keys_of_shards_equal_one_process(num_ranks: int, tokens: int, ranks: Ranks) -> None:
    answers = ranks(num_ranks).run(smeared_job, num_ranks, tokens)
    out, dk = (torch.cat(parts, 2) for parts in list(zip(*answers, strict=True))[:2])
    k, upstream = smear_inputs(tokens)
    share = torch.full((3, 5), 0.5, dtype=torch.float64, requires_grad=True)
    k.requires_grad_()
    expected = reference.smear_keys(k, share)
    torch.testing.assert_close(out, expected.detach(), rtol=0, atol=0)
    want_k, want_share = torch.autograd.grad(expected, (k, share), upstream)
    torch.testing.assert_close(dk, want_k, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(sum(answer[2] for answer in answers), want_share.flatten(), rtol=1e-13, atol=1e-13)


def perturbed_job(case: Case) -> tuple[int, int]:
    """Perturbations after which outputs of earlier tokens changed on any rank, and those of later ones."""
    group = dist.group.WORLD
    layout = RegionLayout(case.num_regions, case.region_size, case.ranks)
    shard = RegionShard(layout, Transport(group), case.way)
    grid = RegionGrid(case.region_size, case.query_block_size, case.causal, 8**-0.5)

    def outputs(tensors: tuple[Tensor, ...]) -> Tensor:
        q, k, v = (x.chunk(case.ranks, 2)[group.rank()].contiguous() for x in tensors)
        if case.kind == "dense":
            return shard.dense_attention(q, k, v, causal=case.causal, layer=0)
        return shard.routed_attention(q, k, v, shard_route(case, shard, q, k), grid, 0)

    changes = torch.zeros(2)
    for token in range(5, case.tokens - 1, 9):
        first, other = inputs(case, seed=token)[:3], inputs(case, seed=1000 + token)[:3]
        second = tuple(
            torch.cat((x[:, :, : token + 1], y[:, :, token + 1 :]), 2) for x, y in zip(first, other, strict=True)
        )
        before, after = outputs(first), outputs(second)
        own = token + 1 - shard.first_token  # tokens of this rank up to the perturbed ones
        own = min(max(own, 0), before.shape[2])
        now = torch.tensor(
            [
                not torch.equal(before[:, :, :own], after[:, :, :own]),
                not torch.equal(before[:, :, own:], after[:, :, own:]),
            ]
        ).float()
        dist.all_reduce(now, op=dist.ReduceOp.MAX)
        changes += now
    return int(changes[0]), int(changes[1])


@pytest.mark.parametrize(
    "case",
    [Case(4), Case(4, query_block_size=4), Case(4, way="ship"), Case(4, kind="dense"), Case(2, skew=2.0)],
    ids=name_of,
)
def test_no_future_token_reaches_an_earlier_rank(case: Case, ranks: Ranks) -> None:
    assert set(ranks(case.ranks).run(perturbed_job, case)) == {(0, 10)}


def test_the_perturbation_test_can_fail(ranks: Ranks) -> None:
    case = Case(4, causal=False, query_block_size=4)
    earlier, _ = ranks(4).run(perturbed_job, case)[0]
    assert earlier == 10


def events_job(case: Case) -> list[str]:
    """What this rank did in forward and backward, in order: all-to-alls started and waited for, attention at home."""
    events: list[str] = []
    start, wait = Transport.start, Pending.wait
    kind_of: dict[Pending, str] = {}

    def watched_start(self: Transport, layer: int, kind: str, *arguments: Any) -> Pending:
        pending = start(self, layer, kind, *arguments)
        kind_of[pending] = kind
        events.append(f"start {kind}")
        return pending

    def watched_wait(self: Pending) -> Tensor:
        events.append(f"wait {kind_of[self]}")
        return wait(self)

    def watched(name: str) -> Any:
        compute = getattr(region_attention, name)

        def call(q: Tensor, k: Tensor, v: Tensor, route: Tensor, grid: RegionGrid, **options: Any) -> Any:
            if grid.same_tokens:
                events.append("own regions")
            return compute(q, k, v, route, grid, **options)

        return patch.object(region_attention, name, call)

    with (
        patch.object(Transport, "start", watched_start),
        patch.object(Pending, "wait", watched_wait),
        watched("partial_attention"),
        watched("partial_attention_backward"),
    ):
        sharded(case)
    return events


def test_own_regions_are_attended_while_payloads_travel(ranks: Ranks) -> None:
    for events in ranks(4).run(events_job, Case(4)):
        forward, backward = (place for place, event in enumerate(events) if event == "own regions")
        before, between, after = events[:forward], events[forward + 1 : backward], events[backward + 1 :]
        assert {"start keys", "start queries"} <= {*before}
        assert not {"wait keys", "wait queries"} & {*before}
        assert {"wait queries", "start results", "wait keys", "wait results"} <= {*between}
        assert [event for event in between if "gradients" in event] == ["start gradients"] * 2
        assert [event for event in after if event == "wait gradients"] == ["wait gradients"] * 3


def test_both_ways_are_taken(ranks: Ranks) -> None:
    """With eight ranks and many regions some transfers ship; with a popular region all fetch."""
    shipped = [answer["shipped"] for answer in ranks(8).run(sharded_job, Case(8, num_regions=48, heads=2))]
    assert any(shipped)
    fetched = [answer["shipped"] for answer in ranks(2).run(sharded_job, Case(2, heads=8, skew=5.0))]
    assert not any(fetched)
