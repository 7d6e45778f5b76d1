"""The parts of a layer that are written out in other operations than the module's."""

from __future__ import annotations

import pytest
import torch

from biroute.model.decode.plain_layers import _norm
from biroute.model.norm import RMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [16, 96, 250, 704])
def test_a_norm_has_the_bits_of_the_module(size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(size)
    module = RMSNorm(size, 1e-5)
    with torch.no_grad():
        module.weight.normal_(1.0, 0.3)
        module.to(dtype)
        for shape in ((1, size), (7, size), (3, 2, 4, size)):
            for scale in (1e-3, 1.0, 300.0):
                x = (torch.randn(shape) * scale).to(dtype)
                assert torch.equal(_norm(module)(x), module(x)), (shape, scale)
