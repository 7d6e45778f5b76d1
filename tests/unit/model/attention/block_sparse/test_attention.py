"""The kernels in Triton's interpreter against the slow reference and dense masked attention: values and gradients."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from biroute.model.attention.block_sparse import attention as kernels
from biroute.model.attention.block_sparse.plan import TilePlan
from biroute.model.attention.grid import RegionGrid


@dataclass(frozen=True)
class Case:
    """Sizes of one comparison; `scratch` and `unit_rows` are small enough to cut the work into many pieces."""

    batch: int = 1
    groups: int = 1
    heads: int = 2
    tokens: int = 64
    key_tokens: int = 64
    head_size: int = 32
    region: int = 16
    block: int = 1
    topk: int = 3
    causal: bool = True
    empty: float = 0.0  # fraction of the query blocks without a route
    dtype: torch.dtype = torch.float32
    scratch: int = 1 << 29
    unit_rows: int = 1024
    short: int = 0  # regions for each slot of a route up to which forward shares everything

    @property
    def grid(self) -> RegionGrid:
        return RegionGrid(self.region, self.block, self.causal, self.head_size**-0.5, same_tokens=self.causal)


CASES = {
    "a token a route, shared and scattered": Case(heads=4, tokens=96, key_tokens=96),
    "many segments and units": Case(batch=2, tokens=80, key_tokens=80, scratch=60_000, unit_rows=16),
    "scattered pairs of every head": Case(batch=2, groups=2, tokens=128, key_tokens=128, region=8, unit_rows=32),
    "own regions of few tokens, scattered": Case(tokens=128, key_tokens=128, region=4, topk=2),
    "one route a region": Case(heads=4, region=32, block=32, topk=2, unit_rows=64),
    "sizes that fill no tile": Case(groups=2, heads=3, tokens=60, key_tokens=72, head_size=40, region=24, block=4,
                                    topk=2, causal=False, empty=0.3),
    "a region in parts": Case(heads=1, head_size=256, region=64, block=2, topk=2, tokens=128, key_tokens=128),
    "scattered pairs, regions in parts": Case(heads=1, head_size=256, region=40, topk=2, tokens=320, key_tokens=320),
    "parts of unequal size": Case(heads=1, head_size=256, region=48, block=16, topk=2, tokens=96, key_tokens=96),
    "half precision, no route at all": Case(tokens=32, key_tokens=96, topk=5, causal=False, empty=0.5,
                                            dtype=torch.float16),
    "more slots than regions": Case(tokens=32, key_tokens=32, topk=6),
    "sixteen heads": Case(heads=16, tokens=32, key_tokens=32, topk=2),
    "regions that nobody chose": Case(tokens=16, key_tokens=128, block=16, topk=2, causal=False),
    "regions that nobody chose, many segments": Case(tokens=64, key_tokens=128, topk=2, causal=False, empty=0.95,
                                                     scratch=20_000, unit_rows=16),
    "one head": Case(heads=1, tokens=64, topk=2),
    "short, all shared in forward alone": Case(heads=4, tokens=96, key_tokens=96, head_size=16, short=4,
                                               scratch=60_000, unit_rows=16),
    "several tiles and pairs in a unit": Case(heads=1, tokens=256, key_tokens=256, head_size=16, region=8, topk=4,
                                              unit_rows=32),
    "fewer blocks than a tile, the last one short": Case(heads=3, tokens=72, key_tokens=72, head_size=16, region=8,
                                                         block=2, topk=2, unit_rows=64),
}  # fmt: skip


def random_route(case: Case) -> Tensor:
    """Ascending regions, -1 last: of the past with the own one if causal, else any; some blocks have none."""
    blocks, regions = case.tokens // case.block, case.key_tokens // case.region
    route = torch.full((case.batch, case.groups, blocks, case.topk), -1)
    for b in range(case.batch):
        for g in range(case.groups):
            for n in range(blocks):
                own = n * case.block // case.region
                others = torch.randperm(own if case.causal else regions)[: case.topk - case.causal].tolist()
                if float(torch.rand(())) < case.empty:
                    others = []
                chosen = sorted([*others, *([own] if case.causal else [])])
                route[b, g, n, : len(chosen)] = torch.tensor(chosen, dtype=torch.int64)
    return route


def dense_reference(q: Tensor, k: Tensor, v: Tensor, route: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Softmax attention in fp64 under the mask that the route means: nothing of ours in it."""
    q, k, v = q.double(), *(x.double().repeat_interleave(case.heads, 1) for x in (k, v))
    routed = torch.zeros(case.batch, case.groups, case.tokens, case.key_tokens, dtype=torch.bool)
    for b, g, n, slot in (route >= 0).nonzero().tolist():
        region = int(route[b, g, n, slot])
        routed[b, g, n * case.block : (n + 1) * case.block, region * case.region : (region + 1) * case.region] = True
    if case.causal:
        routed &= torch.ones(case.tokens, case.key_tokens, dtype=torch.bool).tril()
    score = (q @ k.transpose(2, 3)) * case.head_size**-0.5
    score = score.masked_fill(~routed.repeat_interleave(case.heads, 1), -torch.inf)
    lse = score.logsumexp(-1)
    return (score - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp() @ v, lse


def inputs(case: Case) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    heads = case.groups * case.heads
    shapes = [
        (heads, case.tokens),
        (case.groups, case.key_tokens),
        (case.groups, case.key_tokens),
        (heads, case.tokens),
    ]
    return [torch.randn(case.batch, n, tokens, case.head_size).to(case.dtype) for n, tokens in shapes]


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    finite = expected.isfinite()
    assert torch.equal(finite, found.isfinite())
    scale = expected[finite].abs().max().clamp(min=1.0)
    torch.testing.assert_close(found.double()[finite], expected[finite], rtol=0, atol=float(tolerance * scale))


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_dense_masked_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    monkeypatch.setattr(kernels, "SCRATCH_BYTES", case.scratch)
    monkeypatch.setattr(kernels, "SHORT", case.short)
    for bound in ("FORWARD_UNIT_ROWS", "BACKWARD_UNIT_ROWS", "BLOCK_UNIT_ROWS"):
        monkeypatch.setattr(kernels, bound, case.unit_rows)
    q, k, v, dout = inputs(case)
    route = random_route(case)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = dense_reference(*leaves, route, case)
    gradients = torch.autograd.grad(out, leaves, dout.double())
    tolerance = 2e-6 if case.dtype == torch.float32 else 2e-3

    found, found_lse = kernels.sparse_attention(q, k, v, route, case.grid)
    assert_near(found, out.detach(), tolerance)
    assert_near(found_lse, lse.detach(), tolerance)
    delta = kernels.output_delta(found, dout)
    assert_near(delta, (out * dout.double()).sum(-1).detach(), 4 * tolerance)
    backward = kernels.sparse_attention_backward(
        q, k, v, route, case.grid, dout=dout, lse=found_lse, delta=delta, out_dtype=torch.float32
    )
    for found_gradient, gradient in zip(backward, gradients, strict=True):
        assert found_gradient.dtype == torch.float32
        assert_near(found_gradient, gradient, 2 * tolerance)


def plan_of(case: Case, route: Tensor) -> TilePlan:
    """The plan of a forward pass in one launch."""
    q, k, v, _ = inputs(case)
    (launch,) = kernels.Call.of(q, k, v, route, case.grid).forward_launches()
    return launch.plan


def test_a_case_scatters_pairs_of_every_head() -> None:
    """Otherwise the offsets of a head in the kernels of scattered pairs would be tested at head 0 alone."""
    case = CASES["scattered pairs of every head"]
    plan = plan_of(case, random_route(case))
    pairs = plan.scattered.sum((1, 2))
    assert len(pairs) == 4
    assert pairs.min() > 20
    assert plan.counts.min() > 0


def test_a_case_scatters_the_own_region() -> None:
    """Otherwise the causal mask inside a region would be tested where tiles share it alone."""
    case = CASES["own regions of few tokens, scattered"]
    route = random_route(case)
    own = route.flatten(0, 1) == (torch.arange(case.tokens) // case.region)[:, None]
    assert (plan_of(case, route).scattered & own).sum() > 20


def test_short_sequences_share_everything_in_forward_alone() -> None:
    case = Case(tokens=16, key_tokens=16 * 8, region=8, topk=4, causal=False)
    route = torch.zeros(1, 1, 16, 4, dtype=torch.int64)
    for regions, short in ((16, True), (17, False)):
        q, k = torch.empty(1, 2, 16, 32), torch.empty(1, 1, regions * 8, 32)
        call = kernels.Call.of(q, k, k, route, case.grid)
        assert (call.sizes.all_shared, call.turned().sizes.all_shared) == (short, False)


def test_two_runs_give_the_same_bits() -> None:
    case = Case(heads=4, tokens=48, key_tokens=48)
    q, k, v, dout = inputs(case)
    route = random_route(case)

    def run() -> list[Tensor]:
        out, lse = kernels.sparse_attention(q, k, v, route, case.grid)
        delta = kernels.output_delta(out, dout)
        return [
            out,
            lse,
            *kernels.sparse_attention_backward(q, k, v, route, case.grid, dout=dout, lse=lse, delta=delta),
        ]

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


def test_later_tokens_and_later_routes_change_no_earlier_bit() -> None:
    case = Case(heads=2, tokens=64, key_tokens=64)
    q, k, v, _ = inputs(case)
    route = random_route(case)
    out, _ = kernels.sparse_attention(q, k, v, route, case.grid)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, 40:] += 1.0
    other = route.clone()
    other[:, :, 40:] = random_route(case)[:, :, 40:]
    again, _ = kernels.sparse_attention(*changed, other, case.grid)
    torch.testing.assert_close(again[:, :, :40], out[:, :, :40], rtol=0, atol=1e-6)
    assert not torch.equal(again[:, :, 40:], out[:, :, 40:])


def test_parts_of_a_route_make_up_the_whole() -> None:
    """What a region rank does: own and foreign regions apart, joined by their log-sum-exps."""
    whole = Case(tokens=32, key_tokens=64, causal=False, topk=4)
    q, k, v, dout = inputs(whole)
    route = random_route(whole)
    out, lse = kernels.sparse_attention(q, k, v, route, whole.grid)
    delta = kernels.output_delta(out, dout)
    gradients = kernels.sparse_attention_backward(q, k, v, route, whole.grid, dout=dout, lse=lse, delta=delta)
    halves = []
    for first in (0, 2):
        tokens = slice(first * whole.region, (first + 2) * whole.region)
        part = route - first
        part = part.masked_fill((part < 0) | (part >= 2), 9).sort(-1).values
        part = part.masked_fill(part == 9, -1)
        sides = (q, k[:, :, tokens], v[:, :, tokens], part, whole.grid)
        values = kernels.sparse_attention(*sides)
        halves.append((values, kernels.sparse_attention_backward(*sides, dout=dout, lse=lse, delta=delta)))
    weights = [(values[1] - lse).exp()[..., None] for values, _ in halves]
    joined = sum(values[0] * weight for (values, _), weight in zip(halves, weights, strict=True))
    torch.testing.assert_close(joined, out, rtol=0, atol=1e-6)
    torch.testing.assert_close(halves[0][1][0] + halves[1][1][0], gradients[0], rtol=0, atol=1e-5)
    for place in (1, 2):
        torch.testing.assert_close(
            torch.cat([half[1][place] for half in halves], 2), gradients[place], rtol=0, atol=1e-5
        )


def test_strided_inputs_are_taken() -> None:
    case = Case(tokens=32, key_tokens=32)
    q, k, v, _ = inputs(case)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not strided[0].is_contiguous()
    route = random_route(case)
    for one, other in zip(
        kernels.sparse_attention(*strided, route, case.grid), kernels.sparse_attention(q, k, v, route, case.grid),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "message"),
    [((1, 1, 16, 512), (1, 1, 16, 512), "head size 512"), ((1, 1, 1, 128), (1, 1, 1 << 24, 128), "less than 2")],
)
def test_sizes_beyond_the_kernels_are_refused(q_shape: tuple, k_shape: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.check_sizes(torch.empty(q_shape, device="meta"), torch.empty(k_shape, device="meta"))
