"""Inputs of attention over a route, drawn and fixed, and how close two results must be."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from biroute.model.attention.bi_level import bi_level_attention
from biroute.model.attention.routing import route_regions
from biroute.model.attention.rule import RouteRule

PATHS = ("query_major", "region_major", "auto")


def tensors(batch: int, heads: int, groups: int, tokens: int, size: int, seed: int = 0, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (heads, groups, groups)
    q, k, v = (torch.randn(batch, n, tokens, size, generator=generator) * scale for n in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def gradients(out: Tensor, inputs: tuple[Tensor, ...], seed: int = 1) -> tuple[Tensor, ...]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad(out, inputs, weight.to(out.dtype))


def assert_equal_to(out: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(out.double(), expected.double(), rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@st.composite
def attention_cases(draw: st.DrawFn, causal: bool | None = None) -> tuple[tuple[Tensor, ...], dict, dict]:
    """(q, k, v), sizes shared by routing and attention, the other arguments of routing."""
    region_size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    block = draw(st.sampled_from([n for n in range(1, region_size + 1) if region_size % n == 0]))
    regions, rep, groups = draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.integers(1, 2))
    causal = draw(st.booleans()) if causal is None else causal
    forced = {
        "force_own": causal or draw(st.booleans()),
        "force_previous": draw(st.booleans()),
        "attention_sink": draw(st.booleans()),
    }
    topk = draw(st.integers(max(1, sum(forced.values())), regions + 2))
    # Small logits, ordinary ones, and some that overflow any weight taken relative to the own region.
    scale = draw(st.sampled_from([0.1, 1.0, 1.0, 6.0]))
    inputs = tensors(
        draw(st.integers(1, 2)),
        rep * groups,
        groups,
        region_size * regions,
        draw(st.sampled_from([2, 8])),
        draw(st.integers(0, 2**31)),
        scale,
    )
    sizes = {"region_size": region_size, "query_block_size": block, "causal": causal}
    return inputs, sizes, dict(topk=topk, **forced)


def attend(q: Tensor, k: Tensor, v: Tensor, path: str, sizes: dict, rule: dict) -> Tensor:
    return bi_level_attention(q, k, v, route_regions(q, k, RouteRule(**sizes, **rule)), path=path, **sizes)
