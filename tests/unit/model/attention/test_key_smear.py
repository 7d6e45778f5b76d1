"""Key smearing against the reference implementation, and what it may depend on."""

from __future__ import annotations

import pytest
import torch

from biroute.model.attention import reference
from biroute.model.attention.key_smear import KeySmear


@pytest.mark.parametrize("tokens", [2, 17])
def test_values_and_gradients_equal_the_loop(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    k = torch.randn(2, 3, tokens, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    smear = KeySmear(3, 5).double()
    with torch.no_grad():
        smear.share.copy_(torch.randn(15, generator=generator))
    out, expected = smear(k), reference.smear_keys(k, smear.share.view(3, 5))
    assert torch.equal(out, expected)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad(out, (k, smear.share), upstream)
    wanted = torch.autograd.grad(expected, (k, smear.share), upstream)
    for got, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


def test_the_key_before_may_come_from_elsewhere() -> None:
    k, smear = torch.randn(2, 2, 12, 4), KeySmear(2, 4)
    whole = smear(k)
    assert torch.equal(smear(k[:, :, 5:], k[:, :, 4:5]), whole[:, :, 5:])
    assert torch.equal(whole[:, :, 0], k[:, :, 0])


def test_a_key_depends_on_itself_and_the_one_before_alone() -> None:
    k, smear = torch.randn(1, 1, 16, 4), KeySmear(1, 4)
    changed = k.clone()
    changed[:, :, 6] += 1.0
    different = (smear(k) != smear(changed)).any(-1).flatten()
    assert different.nonzero().flatten().tolist() == [6, 7]


def test_bf16_keys_stay_bf16() -> None:
    k = torch.randn(1, 2, 8, 4).bfloat16()
    smeared = KeySmear(2, 4).bfloat16()(k)
    assert smeared.dtype == torch.bfloat16
    torch.testing.assert_close(
        smeared.double(), reference.smear_keys(k, torch.full((2, 4), 0.5)), rtol=0.01, atol=0.01
    )


def test_the_shares_are_marked_as_split_by_groups() -> None:
    share = KeySmear(2, 4).share
    assert (share.tensor_model_parallel, share.partition_dim, share.partition_stride) == (True, 0, 1)
