"""The kernels of RMSNorm against torch in fp64: values, and gradients of input and weight."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

from biroute.model import norm_kernels
from biroute.model.norm_kernels import normalize, normalize_backward

DEVICE = os.environ.get("BIROUTE_TEST_DEVICE", "cpu")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 4e-3)])
@pytest.mark.parametrize(("rows", "width"), [(50, 96), (7, 4100), (1, 64)])
def test_the_kernels_equal_plain_torch(
    rows: int, width: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several rows of a program and rows that fill none, programs that walk through several blocks, one row alone."""
    monkeypatch.setattr(norm_kernels, "PROGRAMS", 2)
    monkeypatch.setattr(norm_kernels, "ELEMENTS", 1024)
    x, dout = ((3 * torch.randn(rows, width)).to(dtype) for _ in range(2))
    weight = (1 + 0.3 * torch.randn(width)).to(dtype)
    exact = [y.double().requires_grad_() for y in (x, weight)]
    expected = F.rms_norm(exact[0], (width,), exact[1], 0.1)
    gradients = torch.autograd.grad(expected, exact, dout.double())
    x, weight, dout = (y.to(DEVICE) for y in (x, weight, dout))
    out, scale = normalize(x, weight, 0.1)
    found = out, *normalize_backward(x, weight, scale, dout)
    for one, other in zip(found, (expected.detach(), *gradients), strict=True):
        assert one.dtype == dtype
        size = float(other.abs().max())
        torch.testing.assert_close(one.cpu().double(), other, rtol=tolerance, atol=tolerance * size)
