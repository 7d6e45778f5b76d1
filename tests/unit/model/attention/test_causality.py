"""No token of a causal model depends on a later one, bit for bit; and a model in which one does is found out."""

from __future__ import annotations

import pytest
import torch
from helpers.attention import PATHS, attend, attention_cases, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from biroute.model.attention import partial, routing
from biroute.model.attention.bi_level import bi_level_attention
from biroute.model.attention.rule import RouteRule


def perturbed(x: Tensor, after: int, factor: float) -> Tensor:
    changed = x.detach().clone()
    changed[:, :, after + 1 :] = torch.randn_like(changed[:, :, after + 1 :]) * factor
    return changed


@settings(max_examples=60)
@given(
    attention_cases(causal=True),
    st.sampled_from(PATHS),
    st.integers(0, 63),
    st.sampled_from([0.1, 1.0, 50.0]),
    st.sampled_from([1, 64, 1 << 14]),
)
def test_later_tokens_change_no_earlier_bit(case, path: str, after: int, factor: float, chunk: int) -> None:
    inputs, sizes, rule = case
    after %= inputs[0].shape[2]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(partial, "CHUNK_ELEMENTS", (chunk, chunk))
        before = attend(*inputs, path, sizes, rule)
        changed = attend(*(perturbed(x, after, factor) for x in inputs), path, sizes, rule)
    assert torch.equal(before[:, :, : after + 1], changed[:, :, : after + 1])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("block", "region_size", "topk"), [(1, 16, 8), (8, 32, 4), (64, 64, 4)])
def test_later_tokens_change_no_earlier_bit_in_longer_sequences(path, block, region_size, topk) -> None:
    inputs = tensors(1, 4, 2, 1024, 32)
    sizes, rule = {"region_size": region_size, "query_block_size": block, "causal": True}, {"topk": topk}
    with torch.no_grad():
        before = attend(*inputs, path, sizes, rule)
        for after in (0, 200, 511, 777, 1022):
            changed = attend(*(perturbed(x, after, 3.0) for x in inputs), path, sizes, rule)
            assert torch.equal(before[:, :, : after + 1], changed[:, :, : after + 1])
            assert not torch.equal(before[:, :, after + 1 :], changed[:, :, after + 1 :])


@settings(max_examples=20)
@given(attention_cases(causal=True), st.sampled_from(PATHS), st.integers(0, 63))
def test_earlier_outputs_have_no_gradient_in_later_tokens(case, path: str, after: int) -> None:
    inputs, sizes, rule = case
    after %= inputs[0].shape[2]
    out = attend(*inputs, path, sizes, rule)
    for gradient in torch.autograd.grad(out[:, :, : after + 1].square().sum(), inputs):
        assert not gradient[:, :, after + 1 :].any()


def test_a_mean_query_in_a_causal_model_leaks() -> None:
    # The same perturbation test must fail for BiFormer's mean query, or it could not fail at all.
    q, k, v = (x.detach() for x in tensors(1, 2, 1, 64, 8))
    sizes = {"region_size": 8, "query_block_size": 8, "causal": True}
    rule = RouteRule(region_size=8, query_block_size=8, topk=3, causal=True)

    def mean_query_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries = routing.query_descriptors(q, 1, 8, causal=False)
        affinity = queries @ routing.key_descriptors(k, 8).transpose(2, 3)
        route = routing.select_regions(affinity, torch.arange(8), rule)
        return bi_level_attention(q, k, v, route, **sizes)

    before, leaks, honest = mean_query_attention(q, k, v), 0, attend(q, k, v, "auto", sizes, {"topk": 3})
    for after in range(33, 62):
        changed = [perturbed(x, after, 3.0) for x in (q, k, v)]
        leaks += not torch.equal(before[:, :, : after + 1], mean_query_attention(*changed)[:, :, : after + 1])
        routed = attend(*changed, "auto", sizes, {"topk": 3})
        assert torch.equal(honest[:, :, : after + 1], routed[:, :, : after + 1])
    assert leaks > 5
