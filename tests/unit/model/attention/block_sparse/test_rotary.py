"""The kernel of the rotary embedding: the very bits of the reference, which rounds each product and sum, too."""

from __future__ import annotations

import pytest
import torch

from biroute.model.attention.block_sparse.rotary import rotate
from biroute.model.attention.rope import apply_rotary, rotary_tables


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 12), (torch.float16, 32)])
def test_both_directions_equal_the_reference(dtype: torch.dtype, size: int) -> None:
    qkv = torch.randn(37, 2, 3, 3 * size).to(dtype)
    x = qkv.permute(1, 2, 0, 3)[..., size : 2 * size].detach().requires_grad_()  # strides of a mixed projection
    tables = rotary_tables(37, 5, size, 10_000.0, x.device)
    expected = apply_rotary(x.cpu(), *(table.cpu() for table in tables))
    found = rotate(x.detach(), *tables, 1.0)
    assert found.is_contiguous()
    # Compiled, a product and a sum may be one operation that rounds once.
    tolerance = {"rtol": 0, "atol": 0 if x.device.type == "cpu" else 1e-3}
    torch.testing.assert_close(found.cpu(), expected.detach(), **tolerance)
    dout = torch.randn_like(found)
    (gradient,) = torch.autograd.grad(expected, x, dout.cpu())
    back = rotate(dout, *tables, -1.0, by_token=True)
    assert back.permute(2, 0, 1, 3).is_contiguous(), "as in the gradient of the mixed projection"
    torch.testing.assert_close(back.cpu(), gradient.cpu(), **tolerance)
