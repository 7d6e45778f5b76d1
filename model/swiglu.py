"""The gate of the MLP, SwiGLU: the product of silu of the first half with the second. On a GPU one kernel each way.

Source: Shazeer 2020, *GLU Variants Improve Transformer* (arXiv:2002.05202), equation 6, without biases.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biroute.model.attention.grid import KERNEL_DEVICES


class SwiGLU(nn.Module):
    """[..., 2 F] -> [..., F], as Megatron-core's MLP calls its activation."""

    def __init__(self, config: object = None) -> None:
        """Args: config: Megatron-core's, which it passes to every module; unused."""
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., 2 F] -> silu(first half) * second half, in x's dtype."""
        if x.device.type in KERNEL_DEVICES and x.dtype != torch.float64:
            gated: Tensor = _Gated.apply(x)
            return gated
        gate, up = x.chunk(2, dim=-1)
        # Megatron-core's own MLP adds an offset, which is 0: without it, zeros would have other signs than they had.
        return F.silu(gate) * (up + 0.0)


class _Gated(torch.autograd.Function):
    """Keeps the input alone: silu and the sigmoid are computed again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        from biroute.model import swiglu_kernels

        ctx.save_for_backward(x)
        return swiglu_kernels.gate(x.detach())

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:  # type: ignore[override]
        from biroute.model import swiglu_kernels

        (x,) = ctx.saved_tensors
        return swiglu_kernels.gate_backward(x.detach(), dout)
