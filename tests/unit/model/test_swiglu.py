"""SwiGLU: on the CPU the bits of Megatron-core's own MLP; the kernels against it, values and gradients."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from biroute.model.swiglu import SwiGLU
from biroute.model.swiglu_kernels import gate, gate_backward

DEVICE = os.environ.get("BIROUTE_TEST_DEVICE", "cpu")


class Same(nn.Module):
    """In the place of both matrices of an MLP."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None


def of_megatron(x: Tensor) -> Tensor:
    """What Megatron-core's MLP does between its matrices without an activation of a layer spec."""
    mlp = MLP.__new__(MLP)
    nn.Module.__init__(mlp)
    mlp.linear_fc1, mlp.linear_fc2 = Same(), Same()

    mlp.config = SimpleNamespace(
        use_te_activation_func=False, bias_activation_fusion=False, gated_linear_unit=True, activation_func=F.silu,
        activation_func_clamp_value=None, glu_linear_offset=0.0,
    )  # fmt: skip
    out: Tensor = mlp(x)[0]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_cpu_it_has_the_bits_of_megatron_core(dtype: torch.dtype) -> None:
    x = torch.randn(3, 2, 24).to(dtype)
    x[0, 0] = -0.0
    sides = []
    for activation in (SwiGLU(), of_megatron):
        leaf = x.clone().requires_grad_()
        out = activation(leaf)
        (gradient,) = torch.autograd.grad(out.square().sum(), leaf)
        sides.append([y.view(torch.int32 if dtype == torch.float32 else torch.int16) for y in (out, gradient)])
    assert all(torch.equal(one, other) for one, other in zip(*sides, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 4e-3)])
def test_the_kernels_equal_plain_torch(dtype: torch.dtype, tolerance: float) -> None:
    """Rows and columns that fill no program, and a gradient that is not contiguous."""
    x = torch.randn(3, 5, 2 * 520).to(dtype)
    exact = x.double().requires_grad_()
    expected = SwiGLU()(exact)
    dout = torch.randn(5, 3, 520).to(dtype).transpose(0, 1)
    (gradient,) = torch.autograd.grad(expected, exact, dout.double())
    found, found_gradient = gate(x.to(DEVICE)), gate_backward(x.to(DEVICE), dout.to(DEVICE))
    assert found.dtype == found_gradient.dtype == dtype
    torch.testing.assert_close(found.cpu().double(), expected.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found_gradient.cpu().double(), gradient, rtol=tolerance, atol=tolerance)
