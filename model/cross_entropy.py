"""Cross-entropy that needs no memory beside the logits: its gradient takes their place, some tokens at a time.

Megatron-core's function keeps fp32 probabilities of all tokens for backward, beside 16-bit logits and their 16-bit
gradient: 8 bytes for each logit. Here it is 2.

Shapes: S tokens, B sequences, V padded vocabulary, T tensor ranks.

Source: a gradient computed in forward, some tokens at a time, is that of Liger Kernel (Hsu et al. 2024,
arXiv:2410.10989); the sums over tensor ranks are those of Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.parallel_state import get_tensor_model_parallel_group
from torch import Tensor

# fp32 logits of one chunk: 256 MiB, which hides the launches and is little beside the logits of a long sequence.
CHUNK_ELEMENTS = 1 << 26


def chunked_cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor, chunk_elements: int = CHUNK_ELEMENTS
) -> Tensor:
    """Sum the weighted cross-entropies of all tokens; the logits are lost if they require a gradient.

    Args:
        logits: [S, B, V / T], of any precision; sums are fp32.
        labels: int64 [S, B] of the whole vocabulary.
        weights: fp32 [S, B].
        chunk_elements: most logits that are in fp32 at the same time.

    Returns:
        A scalar in nats. Its gradient can be computed once.
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(logits, labels, weights, chunk_elements)
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor, chunk_elements: int) -> Tensor:
        width, keeps_gradient = logits.shape[-1], ctx.needs_input_grad[0]
        rows, label, weight = logits.detach().reshape(-1, width), labels.reshape(-1), weights.reshape(-1)
        losses = torch.empty_like(weight)
        chunk = max(1, chunk_elements // width)
        for first in range(0, len(rows), chunk):
            part = slice(first, first + chunk)
            _chunk(rows[part], label[part], weight[part], losses[part], keeps_gradient)
        if keeps_gradient:
            ctx.gradient = rows.view_as(logits)
        return (losses * weight).sum()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(dloss), None, None, None


def _chunk(logits_NV: Tensor, label_N: Tensor, weight_N: Tensor, losses_N: Tensor, keeps_gradient: bool) -> None:
    """Write the losses of some tokens and, in the place of their logits, the gradient of the weighted sum."""
    group = get_tensor_model_parallel_group()
    x_NV = logits_NV.to(torch.float32, copy=True)
    top_N = x_NV.amax(1)
    dist.all_reduce(top_N, dist.ReduceOp.MAX, group)
    x_NV -= top_N[:, None]
    label_N = label_N - group.rank() * x_NV.shape[1]
    elsewhere_N = (label_N < 0) | (label_N >= x_NV.shape[1])  # the label is another tensor rank's
    column_N1 = label_N.masked_fill(elsewhere_N, 0)[:, None]
    sums_2N = torch.stack([x_NV.gather(1, column_N1)[:, 0].masked_fill(elsewhere_N, 0.0), x_NV.exp_().sum(1)])
    dist.all_reduce(sums_2N, dist.ReduceOp.SUM, group)
    predicted_N, total_N = sums_2N
    torch.sub(total_N.log(), predicted_N, out=losses_N)
    if keeps_gradient:
        x_NV *= (weight_N / total_N)[:, None]
        x_NV.scatter_add_(1, column_N1, -weight_N.masked_fill(elsewhere_N, 0.0)[:, None])
        logits_NV.copy_(x_NV)
