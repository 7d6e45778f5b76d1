"""The layers on an emulated device: nothing mixes devices, and the host waits for the device nowhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import emulated_device
from helpers.emulated_device import COUNTS, EmulatedTensor, Emulation, to_device
from helpers.pool import WorkerPool
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from biroute.configs.load import config_from_tree
from biroute.model.attention.core import CoreAttention
from biroute.model.attention.rope import rotary_tables
from biroute.model.attention.suffix import for_dense
from biroute.model.block import drawn_on_cpu
from biroute.model.norm import RMSNorm
from biroute.model.swiglu import SwiGLU

Ranks = Callable[[int], WorkerPool]


Sizes = tuple[int, int, int]  # sequences, key/value heads, tokens
SHORT, SMALL, LARGE = (1, 2, 64), (1, 2, 104), (2, 4, 128)


def layer(sizes: Sizes, attention: dict[str, Any]) -> CoreAttention:
    _, groups, tokens = sizes
    shape = {"num_heads": 2 * groups, "num_kv_heads": groups, "head_size": 8, "num_layers": 1, "hidden_size": 32}
    rule = {"region_size": 8, "topk": 3} | attention
    tree = {"model": shape | {"sequence_length": tokens, "attention": rule}}
    return CoreAttention(config_from_tree(tree, "test").model, 0, num_kv_heads=groups)


def inputs(sizes: Sizes) -> list[Tensor]:
    batch, groups, tokens = sizes
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, heads, tokens, 8, generator=generator, requires_grad=True)
        for heads in (2 * groups, groups, groups)
    ]


def passed(core: CoreAttention, tensors: list[Tensor]) -> list[Tensor]:
    """Output and gradients of a pass in both directions."""
    out = core(*tensors)
    gradients = torch.autograd.grad(out.square().sum(), tensors)
    return [out.detach(), *gradients]


def layer_job(sizes: Sizes, attention: dict[str, Any]) -> tuple[int, dict[str, int], dict[str, int]]:
    """Launches, waits and copies of a layer, both directions, whose results equal those on the CPU."""
    device = emulated_device.activate()
    expected = passed(layer(sizes, attention), inputs(sizes))
    with Emulation():
        core = layer(sizes, attention)
        assert core.key_smear is not None
        core.key_smear.share = torch.nn.Parameter(to_device(core.key_smear.share.detach()))
        tensors = [to_device(x) for x in inputs(sizes)]
        rotary_tables(sizes[2], 0, 8, core.model.rope_base, device)  # made once for all layers
        COUNTS.clear()
        found = passed(core, tensors)
        counted = sum(COUNTS.launches.values()), dict(COUNTS.waits), dict(COUNTS.copies)
    assert all(x.device == device for x in found)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.inner, other, rtol=1e-5, atol=1e-5)
    return counted


# Launches of forward and backward together. A launch costs the host some 5 us, whatever its size.
BUDGETS = {"bi_level": 39, "sliding_window": 42, "dense": 42}


@pytest.mark.parametrize("kind", BUDGETS)
def test_a_layer_waits_nowhere_and_keeps_its_budget_of_launches(ranks: Ranks, kind: str) -> None:
    ((launches, waits, copies),) = ranks(1).run(layer_job, SMALL, {"kind": kind})
    assert (waits, copies) == ({}, {})
    assert 0.8 * BUDGETS[kind] < launches <= BUDGETS[kind]


def test_launches_do_not_grow_with_the_input(ranks: Ranks) -> None:
    short, small, large = (ranks(1).run(layer_job, sizes, {}) for sizes in (SHORT, SMALL, LARGE))
    assert small == large
    # Tiles of a short sequence share all regions in forward: nothing is sorted by region, nothing is scattered.
    assert short[0][0] == small[0][0] - 3


def weights_job() -> tuple[Tensor, Tensor, str]:
    """A weight of another precision on the device, the same in fp32 on the CPU, and where the first one lies now."""
    emulated_device.activate()
    fill = drawn_on_cpu(partial(torch.nn.init.normal_, std=0.1))
    expected = torch.nn.init.normal_(torch.empty(40, 8), std=0.1, generator=torch.Generator().manual_seed(7))
    with Emulation():
        weight = to_device(torch.empty(40, 8, dtype=torch.float64))
        torch.default_generator.manual_seed(7)
        fill(weight)
    assert isinstance(weight, EmulatedTensor)
    return weight.inner, expected, weight.device.type


def test_weights_on_a_device_are_those_of_the_cpu(ranks: Ranks) -> None:
    ((weight, expected, device),) = ranks(1).run(weights_job)
    assert device == emulated_device.TYPE
    assert weight.equal(expected.double())


def dense_job(dtype: torch.dtype) -> tuple[list[int], Tensor, Tensor]:
    """Heads of keys and values that dense attention on a device is given, its output, and that of the CPU."""
    emulated_device.activate()
    q, k, v = (x.detach().to(dtype) for x in inputs(SMALL))
    expected = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    with Emulation():
        there, *both = (to_device(x) for x in (q, k, v))
        given = for_dense(there, *both)
        found = scaled_dot_product_attention(there, *given, is_causal=True, enable_gqa=dtype != torch.float32)
    return [x.shape[1] for x in given], found.inner, expected


def test_dense_attention_in_fp32_on_a_device_has_no_grouped_heads(ranks: Ranks) -> None:
    """PyTorch's kernels for 32 bits take none there: it would write S x S scores to memory."""
    for dtype, heads in ((torch.float32, 4), (torch.bfloat16, 2)):
        ((given, found, expected),) = ranks(1).run(dense_job, dtype)
        assert given == [heads, heads]
        torch.testing.assert_close(found, expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


def norm_job() -> list[tuple[Tensor, Tensor]]:
    """Output and gradients of a norm in fp16 (the interpreter cuts bf16 off), on the device and on the CPU."""
    emulated_device.activate()
    norm = RMSNorm(32, eps=0.1).half()
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.randn(6, 2, 32).half().requires_grad_()
    expected = [norm(x), *torch.autograd.grad(norm(x).square().sum(), (x, norm.weight))]
    with Emulation():
        there = to_device(x)
        norm.weight = torch.nn.Parameter(to_device(norm.weight.detach()))
        found = [norm(there), *torch.autograd.grad(norm(there).square().sum(), (there, norm.weight))]
    return [(one.inner.detach(), other.detach()) for one, other in zip(found, expected, strict=True)]


def test_a_norm_on_a_device_rounds_as_on_the_cpu(ranks: Ranks) -> None:
    (pairs,) = ranks(1).run(norm_job)
    for found, expected in pairs:
        assert found.dtype == torch.float16
        torch.testing.assert_close(found, expected, rtol=2**-10, atol=2**-10)


def gate_job() -> tuple[list[tuple[Tensor, Tensor]], int]:
    """Output and gradient of SwiGLU on the device and on the CPU, and the launches of both directions."""
    emulated_device.activate()
    x, dout = torch.randn(6, 32, requires_grad=True), torch.randn(6, 16)
    expected = [SwiGLU()(x), *torch.autograd.grad(SwiGLU()(x), x, dout)]
    with Emulation():
        there, upstream = to_device(x), to_device(dout)
        COUNTS.clear()
        out = SwiGLU()(there)
        found = [out, *torch.autograd.grad(out, there, upstream)]
        launches = sum(COUNTS.launches.values())
    return [(one.inner.detach(), other.detach()) for one, other in zip(found, expected, strict=True)], launches


def test_swiglu_is_one_kernel_each_way(ranks: Ranks) -> None:
    ((pairs, launches),) = ranks(1).run(gate_job)
    assert launches == 2
    for found, expected in pairs:
        torch.testing.assert_close(found, expected)


def mixing_job() -> str:
    device = emulated_device.activate()
    with Emulation():
        try:
            torch.ones(3, device=device) + torch.ones(3)
        except RuntimeError as error:
            return str(error)
    return "mixed"


def waiting_job() -> tuple[dict[str, int], dict[str, int]]:
    device = emulated_device.activate()
    with Emulation():
        x = torch.ones(3, device=device)
        x[x > 0].sum().item()
        x.to("cpu")
        x.tolist()
        return dict(COUNTS.waits), dict(COUNTS.copies)


def test_the_emulation_can_fail(ranks: Ranks) -> None:
    """It refuses mixed devices, and sees a mask, a number and a list that the host wants, and a copy."""
    assert "tensors on emulated and on the CPU" in ranks(1).run(mixing_job)[0]
    ((waits, copies),) = ranks(1).run(waiting_job)
    assert sorted(name.split()[0] for name in waits) == ["_local_scalar_dense", "index", "tolist"]
    assert sum(copies.values()) == 1
