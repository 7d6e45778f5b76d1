"""Exact products have the same bits in every shape and with any number of threads, where plain ones need not."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from biroute.model.exact_sums import exact_product


@pytest.mark.parametrize("sizes", [(64, 96), (256, 1408), (1366, 256), (2816, 512)], ids=str)
def test_rows_have_the_bits_that_they_have_among_others(sizes: tuple[int, int]) -> None:
    inner, outer = sizes
    x, weight = torch.randn(256, inner), torch.randn(outer, inner)
    whole = exact_product(x, weight)
    torch.testing.assert_close(whole, linear(x, weight), rtol=1e-4, atol=1e-3)
    for count in (1, 2, 3, 4, 7, 16, 100):
        assert torch.equal(torch.cat([exact_product(rows, weight) for rows in x.split(count)]), whole), count
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - threads if threads < 3 else 1)
        assert torch.equal(exact_product(x, weight), whole)
    finally:
        torch.set_num_threads(threads)


def test_gradients_are_those_of_the_product() -> None:
    x, weight = torch.randn(5, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    dout = torch.randn(5, 3)
    found = torch.autograd.grad(exact_product(x, weight), (x, weight), dout)
    expected = torch.autograd.grad(linear(x, weight), (x, weight), dout)
    assert exact_product(x, weight).dtype == x.dtype
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
