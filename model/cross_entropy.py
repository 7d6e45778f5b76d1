"""Cross-entropy that needs no memory beside the logits: on a GPU its gradient takes their place.

Megatron-core's function keeps fp32 probabilities of all tokens for backward, beside 16-bit logits and their 16-bit
gradient: 8 bytes for each logit. Here it is 2.

Shapes: S tokens, B sequences, V padded vocabulary, T tensor ranks, N = S B.

Source: a gradient in the place of the logits is that of Liger Kernel (Hsu et al. 2024, arXiv:2410.10989); the sums
over tensor ranks are those of Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.parallel_state import get_tensor_model_parallel_group
from torch import Tensor


def cross_entropy_in_place(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sum the weighted cross-entropies of all tokens; the logits are lost in backward.

    Args:
        logits: [S, B, V / T] on a device that Triton's kernels run on, of any precision up to fp32; sums are fp32.
        labels: int64 [S, B] of the whole vocabulary.
        weights: fp32 [S, B].

    Returns:
        A scalar in nats. Its gradient can be computed once.
    """
    loss: Tensor = _CrossEntropyInPlace.apply(logits, labels, weights)
    return loss


class _CrossEntropyInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        from biroute.model.cross_entropy_kernels import row_sums

        group = get_tensor_model_parallel_group()
        x_NV = logits.detach().reshape(-1, logits.shape[-1]).contiguous()
        label_N, weight_N = labels.reshape(-1).contiguous(), weights.reshape(-1).contiguous()
        first_word = group.rank() * x_NV.shape[1]
        own_top_N, own_total_N, predicted_N = row_sums(x_NV, label_N, first_word)
        top_N = own_top_N.clone()
        dist.all_reduce(top_N, dist.ReduceOp.MAX, group)
        sums_2N = torch.stack((own_total_N * (own_top_N - top_N).exp(), predicted_N))
        dist.all_reduce(sums_2N, dist.ReduceOp.SUM, group)
        total_N, predicted_N = sums_2N
        if ctx.needs_input_grad[0]:
            ctx.saved = x_NV, label_N, weight_N, top_N, total_N
            ctx.first_word, ctx.shape = first_word, logits.shape
        losses_N = total_N.log() + top_N - predicted_N
        return (losses_N * weight_N).sum()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from biroute.model.cross_entropy_kernels import write_gradient

        # Not `save_for_backward`, which forbids to change them.
        (x_NV, label_N, weight_N, top_N, total_N), ctx.saved = ctx.saved, None
        write_gradient(x_NV, label_N, weight_N * dloss, top_N, total_N, ctx.first_word)
        return x_NV.view(ctx.shape), None, None
