"""The kernels as a path of `bi_level_attention`: values, log-sum-exps and gradients equal those of the reference."""

from __future__ import annotations

import pytest
import torch

from biroute.model.attention import reference
from biroute.model.attention.bi_level import bi_level_attention
from biroute.model.attention.routing import route_regions
from biroute.model.attention.rule import RouteRule


@pytest.mark.parametrize(("block", "causal"), [(1, True), (8, True), (2, False)])
def test_the_path_equals_the_reference(block: int, causal: bool) -> None:
    q, k, v = (torch.randn(1, heads, 64, 16, requires_grad=True) for heads in (4, 2, 2))
    sizes = {"region_size": 16, "query_block_size": block, "causal": causal}
    route = route_regions(q, k, RouteRule(topk=3, **sizes))
    out, lse = bi_level_attention(q, k, v, route, path="block_sparse", return_lse=True, **sizes)
    expected = reference.bi_level_attention(q, k, v, route, **sizes)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    again, expected_lse = bi_level_attention(q, k, v, route, path="query_major", return_lse=True, **sizes)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
    weight, weight_lse = torch.randn_like(out), torch.randn_like(lse)
    found = torch.autograd.grad((out * weight).sum() + (lse * weight_lse).sum(), (q, k, v))
    gradients = torch.autograd.grad((again * weight).sum() + (expected_lse * weight_lse).sum(), (q, k, v))
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
