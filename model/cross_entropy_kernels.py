"""Cross-entropy in two Triton kernels: logits are read twice and written once, in place, with sums in fp32.

A program takes one token and walks over this rank's part of the vocabulary. The reference is torch's cross-entropy.

Source: the sum that is rescaled whenever a larger logit comes is that of Milakov and Gimelshein 2018, *Online
normalizer calculation for softmax* (arXiv:1805.02867).
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 4096  # logits that a program holds at once
WARPS = 8


@triton.jit
def sum_rows(x_ptr, label_ptr, top_ptr, total_ptr, predicted_ptr, width, first_word, WIDTH: tl.constexpr):
    """x [rows, width] and labels [rows] -> each row's largest logit, the sum of exp(x - largest), the label's logit.

    The columns are the words from `first_word` on. Where the label is none of them its logit counts as 0.
    """
    row = tl.program_id(0).to(tl.int64)
    top = float("-inf")
    total = 0.0
    for first in range(0, width, WIDTH):
        column = first + tl.arange(0, WIDTH)
        x = tl.load(x_ptr + row * width + column, mask=column < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        top = higher
    label = tl.load(label_ptr + row) - first_word
    here = (label >= 0) & (label < width)
    predicted = tl.load(x_ptr + row * width + tl.where(here, label, 0), mask=here, other=0.0).to(tl.float32)
    tl.store(top_ptr + row, top)
    tl.store(total_ptr + row, total)
    tl.store(predicted_ptr + row, predicted)


@triton.jit
def replace_by_gradient(x_ptr, label_ptr, weight_ptr, top_ptr, total_ptr, width, first_word, WIDTH: tl.constexpr):
    """x [rows, width] -> (exp(x - top) / total - 1 at the label) * weight, in its place."""
    row = tl.program_id(0).to(tl.int64)
    top = tl.load(top_ptr + row)
    weight = tl.load(weight_ptr + row)
    share = weight / tl.load(total_ptr + row)
    label = tl.load(label_ptr + row) - first_word
    for first in range(0, width, WIDTH):
        column = first + tl.arange(0, WIDTH)
        at = x_ptr + row * width + column
        x = tl.load(at, mask=column < width, other=0.0).to(tl.float32)
        gradient = tl.exp(x - top) * share - tl.where(column == label, weight, 0.0)
        tl.store(at, gradient.to(x_ptr.dtype.element_ty), mask=column < width)


def row_sums(x_NV: Tensor, label_N: Tensor, first_word: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return fp32 [N] each: the largest logit, the sum of exp(x - largest), the label's logit (0: it is not here)."""
    rows, width = x_NV.shape
    found = [torch.empty(rows, dtype=torch.float32, device=x_NV.device) for _ in range(3)]
    sum_rows[(rows,)](x_NV, label_N, *found, width, first_word, WIDTH=WIDTH, num_warps=WARPS)
    return found[0], found[1], found[2]


def write_gradient(
    x_NV: Tensor, label_N: Tensor, weight_N: Tensor, top_N: Tensor, total_N: Tensor, first_word: int
) -> None:
    """Replace contiguous logits by the gradient of the weighted sum of cross-entropies, given sums of all words."""
    rows, width = x_NV.shape
    replace_by_gradient[(rows,)](
        x_NV, label_N, weight_N, top_N, total_N, width, first_word, WIDTH=WIDTH, num_warps=WARPS
    )
