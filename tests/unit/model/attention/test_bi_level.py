"""Level two against the reference implementation, BiFormer's definition, parts that merge to the whole."""

from __future__ import annotations

import pytest
import torch
from helpers.attention import PATHS, assert_equal_to, attend, attention_cases, gradients, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from biroute.model.attention import partial, reference, tiles
from biroute.model.attention.bi_level import bi_level_attention, dense_attention
from biroute.model.attention.grid import RegionGrid
from biroute.model.attention.partial import attention_delta, merge_partials, partial_attention
from biroute.model.attention.paths import prefers_mask
from biroute.model.attention.routing import route_regions
from biroute.model.attention.rule import RouteRule


@settings(max_examples=60)
@given(attention_cases(), st.sampled_from(PATHS), st.sampled_from([1, 16, 1 << 14]))
def test_values_and_gradients_equal_the_reference(case, path: str, chunk: int) -> None:
    (q, k, v), sizes, rule = case
    route = route_regions(q, k, RouteRule(**sizes, **rule))
    expected = reference.bi_level_attention(q, k, v, route, **sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partial, "CHUNK_ELEMENTS", (chunk, chunk))
        out = bi_level_attention(q, k, v, route, path=path, **sizes)
        assert out.shape == q.shape
        # Logits of several hundred, as at scale 6, carry fp32 rounding of their own into the exponential.
        tolerance = 1e-5 * max(1.0, float(q.detach().abs().max() * k.detach().abs().max()) / 10)
        results = zip((out, *gradients(out, (q, k, v))), (expected, *gradients(expected, (q, k, v))), strict=True)
        for got, want in results:
            size = max(1.0, float(want.detach().abs().max()))
            torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("block", "region_size", "heads", "groups", "topk", "causal"),
    [
        (1, 16, 8, 2, 8, True),
        (8, 16, 4, 1, 4, True),
        (16, 16, 4, 4, 5, True),
        (1, 4, 2, 2, 16, True),
        (4, 32, 6, 2, 3, False),
    ],
)
def test_larger_shapes_equal_the_reference(path, block, region_size, heads, groups, topk, causal) -> None:
    q, k, v = tensors(1, heads, groups, 256, 16)
    sizes = {"region_size": region_size, "query_block_size": block, "causal": causal}
    route = route_regions(q, k, RouteRule(topk=topk, **sizes))
    expected = reference.bi_level_attention(q, k, v, route, **sizes)
    assert_equal_to(bi_level_attention(q, k, v, route, path=path, **sizes), expected, (q, k, v))


@settings(max_examples=25)
@given(attention_cases(), st.sampled_from(PATHS))
def test_all_regions_are_dense_attention(case, path: str) -> None:
    (q, k, v), sizes, rule = case
    if q.detach().abs().max() > 8:  # SDPA itself is not good to 1e-5 at such logits
        q, k, v = (x.detach().div(6).requires_grad_() for x in (q, k, v))
    topk = rule.pop("topk") + k.shape[2] // sizes["region_size"]
    route = route_regions(q, k, RouteRule(topk=topk, **sizes, **rule))
    expected = dense_attention(q, k, v, causal=sizes["causal"])
    assert_equal_to(bi_level_attention(q, k, v, route, path=path, **sizes), expected, (q, k, v))


@pytest.mark.parametrize("path", PATHS)
def test_bidirectional_regions_are_biformer(path: str) -> None:
    # Written out from arXiv:2303.08810, section 3: regions, mean queries and keys, adjacency, top-k, gathered tokens.
    region_size, num_regions, topk = 4, 9, 3
    q, k, v = tensors(2, 2, 2, region_size * num_regions, 8)
    q_r, k_r, v_r = (x.unflatten(2, (num_regions, region_size)) for x in (q, k, v))
    adjacency = q_r.mean(3) @ k_r.mean(3).transpose(2, 3)
    chosen = adjacency.topk(topk).indices
    rows = []
    for b in range(2):
        for h in range(2):
            for i in range(num_regions):
                keys = torch.cat([k_r[b, h, j] for j in chosen[b, h, i]])
                values = torch.cat([v_r[b, h, j] for j in chosen[b, h, i]])
                rows.append(torch.softmax(q_r[b, h, i] @ keys.T / 8**0.5, -1) @ values)
    expected = torch.stack(rows).view(q.shape)
    sizes = {"region_size": region_size, "query_block_size": region_size, "causal": False}
    rule = {"topk": topk, "force_own": False, "force_previous": False}
    assert_equal_to(attend(q, k, v, path, sizes, rule), expected, (q, k, v))


@pytest.mark.parametrize("path", PATHS)
def test_a_query_without_a_route_gives_zero(path: str) -> None:
    q, k, v = tensors(1, 2, 1, 16, 4)
    route = torch.tensor([[0, 3], [-1, -1], [2, -1], [1, 2]])[None, None]
    sizes = {"region_size": 4, "query_block_size": 4, "causal": False}
    out, lse = bi_level_attention(q, k, v, route, path=path, return_lse=True, **sizes)
    assert not out[:, :, 4:8].any()
    assert (lse[:, :, 4:8] == -torch.inf).all()
    expected = reference.bi_level_attention(q, k, v, route, **sizes)
    assert_equal_to(out, expected, (q, k, v))
    nothing = bi_level_attention(q, k, v, torch.full_like(route, -1), path=path, **sizes)
    assert not nothing.any()
    assert not any(gradient.any() for gradient in gradients(nothing, (q, k, v)))


@pytest.mark.parametrize("path", PATHS)
def test_log_sum_exp_and_its_gradient(path: str) -> None:
    q, k, v = tensors(1, 4, 2, 32, 8)
    sizes = {"region_size": 4, "query_block_size": 2, "causal": True}
    route = route_regions(q, k, RouteRule(topk=4, **sizes))
    _, lse = bi_level_attention(q, k, v, route, path=path, return_lse=True, **sizes)
    visible = reference.visibility(route, num_tokens=32, **sizes).repeat_interleave(2, 1)
    score = q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5
    expected = score.masked_fill(~visible, -torch.inf).logsumexp(-1)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients(lse, (q, k)), gradients(expected, (q, k)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_parts_of_the_keys_merge_to_the_whole(path: str) -> None:
    """What sharded regions do: my own regions, fetched regions, and my queries shipped to their owner."""
    q, k, v = (x.detach() for x in tensors(1, 4, 2, 64, 8))
    whole = {"region_size": 4, "query_block_size": 2, "causal": True}
    route = route_regions(q, k, RouteRule(topk=6, **whole))
    out, lse = partial_attention(q, k, v, route, RegionGrid(**whole, scale=0.3))
    dout = torch.randn_like(out)
    delta = attention_delta(out, dout)

    def place(first: int, last: int) -> Tensor:
        """Regions first ... last - 1 by their place among them; all others -1."""
        inside = (route >= first) & (route < last)
        return (route - first).masked_fill(~inside, -1).sort(-1).values[:, :, 16:]

    mine = slice(32, 64)  # tokens of the second of two ranks: regions 8 ... 15, query blocks 16 ... 31
    grid = RegionGrid(4, 2, True, 0.3, path)
    foreign = RegionGrid(4, 2, False, 0.3, path)
    parts = [(k[:, :, mine], v[:, :, mine], place(8, 16), grid)]
    for first, last in ((0, 3), (3, 8)):
        tokens = slice(first * 4, last * 4)
        parts.append((k[:, :, tokens], v[:, :, tokens], place(first, last), foreign))
    got = [partial_attention(q[:, :, mine], *part) for part in parts]
    merged, merged_lse = merge_partials([part[0] for part in got], [part[1] for part in got])
    torch.testing.assert_close(merged, out[:, :, mine], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged_lse, lse[:, :, mine], rtol=1e-5, atol=1e-6)

    # Backward: only the queries of the second rank count.
    only_mine = torch.zeros_like(dout)
    only_mine[:, :, mine] = dout[:, :, mine]
    want = partial.partial_attention_backward(
        q, k, v, route, RegionGrid(**whole, scale=0.3), dout=only_mine, lse=lse, delta=attention_delta(out, only_mine)
    )
    share = {"dout": dout[:, :, mine], "lse": lse[:, :, mine], "delta": delta[:, :, mine]}
    grads = [partial.partial_attention_backward(q[:, :, mine], *part, **share) for part in parts]
    torch.testing.assert_close(sum(grad[0] for grad in grads), want[0][:, :, mine], rtol=1e-5, atol=1e-5)
    for i in (1, 2):
        joined = torch.cat([grads[1][i], grads[2][i], grads[0][i]], 2)
        torch.testing.assert_close(joined, want[i], rtol=1e-5, atol=1e-5)


def test_merging_parts_without_any_key_gives_zero() -> None:
    """A query whose route no part holds: no NaN from 0 / 0."""
    outs = [torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)]
    outs[1][..., 1, :] = 3.0
    lses = [torch.full((1, 1, 2), -torch.inf), torch.tensor([[[-torch.inf, 0.5]]])]
    merged, lse = merge_partials(outs, lses)
    assert merged[0, 0].tolist() == [[0.0] * 4, [3.0] * 4]
    assert lse[0, 0].tolist() == [-torch.inf, 0.5]


@pytest.mark.parametrize(
    ("tokens", "region_size", "block", "groups", "tiles"),
    [
        (2048, 64, 64, 2, "query"),  # 256 query rows share a route to regions of 64 keys: gather keys
        (1024, 64, 64, 2, "region"),  # but one block with all its regions would take half of the queries' memory
        (2048, 64, 64, 8, "query"),  # 64 rows, 64 keys: a tie goes to the keys
        (2048, 64, 8, 2, "region"),  # 32 rows: gather queries
        (2048, 64, 1, 2, "region"),
        (2048, 16, 4, 2, "query"),
    ],
)
def test_automatic_path_gathers_what_is_smaller(tokens, region_size, block, groups, tiles, monkeypatch) -> None:
    taken = []
    for name in ("query", "region"):
        cut = getattr(partial, f"{name}_major_tiles")
        monkeypatch.setattr(
            partial, f"{name}_major_tiles", lambda *args, name=name, cut=cut: taken.append(name) or cut(*args)
        )
    q, k, v = (x.detach() for x in tensors(1, 8, groups, tokens, 32))
    sizes = {"region_size": region_size, "query_block_size": block, "causal": True}
    bi_level_attention(q, k, v, route_regions(q, k, RouteRule(topk=4, **sizes)), **sizes)
    assert set(taken) == {tiles}


@pytest.mark.parametrize(
    ("tokens", "region_size", "rows", "topk", "masked"),
    [
        (512, 16, 4, 4, True),  # short
        (1024, 64, 64, 8, True),  # half of the sequence
        (1024, 64, 64, 7, False),
        (4096, 64, 64, 32, True),
        (8192, 64, 64, 64, False),  # too long
        (2048, 16, 4, 32, True),  # many small regions for few rows
        (2048, 16, 4, 16, False),
        (2048, 16, 16, 32, False),
    ],
)
def test_what_is_masked(tokens: int, region_size: int, rows: int, topk: int, masked: bool) -> None:
    assert prefers_mask(tokens, region_size, rows, topk) == masked


def root_mean_square_error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach()).square().mean().sqrt())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("block", "topk"), [(1, 4), (16, 4), (4, 16)])
def test_bf16_error_is_at_most_twice_that_of_sdpa(path: str, block: int, topk: int) -> None:
    inputs = tuple(x.detach().bfloat16().requires_grad_() for x in tensors(1, 4, 2, 256, 32))
    exact_inputs = tuple(x.detach().double().requires_grad_() for x in inputs)
    sizes = {"region_size": 16, "query_block_size": block, "causal": True}
    route = route_regions(*inputs[:2], RouteRule(topk=topk, **sizes))
    exact = reference.bi_level_attention(*exact_inputs, route, **sizes)
    out = bi_level_attention(*inputs, route, path=path, **sizes)
    visible = reference.visibility(route, num_tokens=256, **sizes).repeat_interleave(2, 1)
    sdpa = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=visible, enable_gqa=True)
    assert out.dtype == torch.bfloat16
    want = (exact, *gradients(exact, exact_inputs))
    ours, theirs = (out, *gradients(out, inputs)), (sdpa, *gradients(sdpa, inputs))
    for mine, other, truth in zip(ours, theirs, want, strict=True):
        assert root_mean_square_error(mine, truth) <= 2 * root_mean_square_error(other, truth)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("factor", [30.0, 1000.0])
def test_huge_logits_neither_overflow_nor_vanish(path: str, factor: float) -> None:
    # Routed keys that outweigh the own region by far more than fp32 can hold as a ratio.
    q, k, v = (x.detach() for x in tensors(1, 2, 1, 64, 8))
    k[:, :, 9] = q[:, :1, 40] * factor
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    sizes = {"region_size": 4, "query_block_size": 1, "causal": True}
    route = route_regions(q, k, RouteRule(topk=6, **sizes))
    out = bi_level_attention(q, k, v, route, path=path, **sizes)
    expected = reference.bi_level_attention(q, k, v, route, **sizes)
    assert 2 in route[0, 0, 40]
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    for got, want in zip(gradients(out, (q, k, v)), gradients(expected, (q, k, v)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * factor)


@pytest.mark.parametrize("path", PATHS)
def test_two_runs_give_the_same_bits(path: str) -> None:
    inputs = tensors(2, 4, 2, 512, 16)
    sizes = {"region_size": 16, "query_block_size": 1, "causal": True}
    results = []
    for _ in range(2):
        out = attend(*inputs, path, sizes, {"topk": 6})
        results.append((out, *gradients(out, inputs)))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("path", ["query_major", "region_major"])
def test_the_size_of_a_chunk_changes_no_bits(path: str) -> None:
    # Heads are taken one after the other, so sums of keys' gradients start with what the head before left.
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(1, 4, 1, 272, 40))
    inputs = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())
    sizes = {"region_size": 16, "query_block_size": 1, "causal": True}
    results = []
    for most in (1 << 12, 1 << 18):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(partial, "MOST_ORDERED_ELEMENTS", 1 << 12)
            patch.setattr(partial, "CHUNK_ELEMENTS", (1 << 10, most))
            out = attend(*inputs, path, sizes, {"topk": 4})
            results.append((out, *gradients(out, inputs)))
    assert all(torch.equal(small, large) for small, large in zip(*results, strict=True))


def test_strided_inputs_and_fp64() -> None:
    q, k, v = (x.detach().double() for x in tensors(2, 4, 2, 32, 8))
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v))
    sizes = {"region_size": 8, "query_block_size": 2, "causal": True}
    route = route_regions(q, k, RouteRule(topk=3, **sizes))
    for path in PATHS:
        out = bi_level_attention(q, k, v, route, path=path, **sizes)
        expected = reference.bi_level_attention(q, k, v, route, **sizes)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        for got, want in zip(gradients(out, (q, k, v)), gradients(expected, (q, k, v)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("route", "message"),
    [
        ([[0, -1], [0, 1], [2, 1], [2, 3]], "not ascending"),
        ([[0, -1], [0, 1], [1, 1], [2, 3]], "not ascending"),
        ([[0, -1], [0, 1], [1, 2], [3, 4]], "a region that is not there"),
        ([[0, -1], [0, 1], [0, 1], [2, 3]], "every block's own region"),
        ([[0, -1], [0, 1], [1, 2]], "is not"),
    ],
)
def test_a_route_that_makes_no_sense_is_refused(route: list[list[int]], message: str) -> None:
    q, k, v = tensors(1, 2, 1, 16, 4)
    with pytest.raises(ValueError, match=message):
        bi_level_attention(q, k, v, torch.tensor(route)[None, None], region_size=4, query_block_size=4, causal=True)


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k, v = tensors(1, 3, 2, 16, 4)
    route = torch.zeros(1, 2, 4, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="shapes do not fit"):
        bi_level_attention(q, k, v, route, region_size=4, query_block_size=4, causal=False)
    with pytest.raises(ValueError, match="do not divide"):
        bi_level_attention(q[:, :2], k, v, route, region_size=5, query_block_size=5, causal=False)


@pytest.mark.parametrize("path", [*PATHS, "masked"])
def test_a_later_region_in_a_causal_route_is_not_seen(path: str) -> None:
    """A route that names the future computes what it computes without it: values and gradients."""
    q, k, v = (torch.randn(1, heads, 24, 8, requires_grad=True) for heads in (2, 1, 1))
    own = torch.arange(24) // 8
    legal = torch.stack((own, torch.full_like(own, -1)), -1)[None, None]
    illegal = torch.stack((own, torch.where(own < 2, own + 1, -1)), -1)[None, None]
    sizes = {"region_size": 8, "query_block_size": 1, "causal": True, "path": path}
    results = []
    for route in (legal, illegal):
        out = bi_level_attention(q, k, v, route, **sizes)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_powers_of_two_have_the_same_bits_however_many_there_are() -> None:
    for rows, keys in ((1, 3), (2, 5), (3, 16), (4, 16), (7, 9), (8, 64)):
        exponents = torch.randn(9, rows, keys) * 5
        whole = tiles.powers_(exponents.clone())
        for count in range(1, 10):
            assert torch.equal(tiles.powers_(exponents[:count].clone()), whole[:count]), (rows, keys, count)
        torch.testing.assert_close(whole, exponents.double().exp2().float(), rtol=1e-6, atol=0)


def test_padding_of_tiles_lends_no_block_its_maximum() -> None:
    """Padding stands for block 0. If its maximum counted, block 0 would be scaled by keys that it does not see."""
    q, k, v = torch.randn(1, 1, 12, 8), torch.randn(1, 1, 12, 8) * 0.1, torch.randn(1, 1, 12, 8)
    k[0, 0, 8:] = q[0, 0, 0] * 1000  # the last region would dwarf everything for query 0, which does not route to it
    route = torch.tensor([[0, -1], [2, -1], [0, 2]]).repeat_interleave(4, 0)[None, None]
    sizes = {"region_size": 4, "query_block_size": 1, "causal": False}
    expected = reference.bi_level_attention(q, k, v, route, **sizes)
    found = bi_level_attention(q, k, v, route, path="region_major", **sizes)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)
