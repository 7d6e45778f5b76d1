"""The kernel of the descriptors: the very bits of plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from biroute.model.attention.block_sparse.descriptors import mean_descriptors
from biroute.model.attention.routing import LARGEST_DESCRIPTOR, key_descriptors, query_descriptors


def projected(heads: int, tokens: int, size: int) -> Tensor:
    """Queries or keys with the strides of a mixed projection, some of them no numbers or too large."""
    x = torch.randn(tokens, 2, heads, 3 * size).half()
    x[3, 0, 0], x[5, 1], x[7, 0, -1] = torch.nan, torch.inf, -65504.0
    return x.permute(1, 2, 0, 3)[..., size : 2 * size]


@pytest.mark.parametrize("causal", [True, False])
def test_descriptors_of_queries_are_those_of_plain_torch(causal: bool) -> None:
    q = projected(6, 68, 40)
    cut = {
        "tokens": 1 if causal else 4,
        "step": 4,
        "largest": LARGEST_DESCRIPTOR,
        "dtype": torch.float16 if causal else torch.float32,
    }
    assert torch.equal(
        mean_descriptors(q, 2, **cut).cpu(), query_descriptors(q.cpu(), 2, 4, causal, dtype=cut["dtype"])
    )


def test_descriptors_of_keys_are_those_of_plain_torch() -> None:
    k = projected(3, 96, 24)
    found = mean_descriptors(k, 3, 6, 6, largest=LARGEST_DESCRIPTOR)
    assert found.dtype == torch.float32
    assert torch.equal(found.cpu(), key_descriptors(k.cpu(), 24, 4))
    assert torch.equal(found[:, :, 0].isfinite().cpu(), torch.ones(2, 3, 24, dtype=torch.bool))
