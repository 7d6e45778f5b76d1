"""RMSNorm (arXiv:1910.07467) with the signature that Megatron-core's layers build norms by."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from biroute.model.attention.grid import KERNEL_DEVICES


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32; on a GPU one kernel each way.

    `partial_gradient_group`: the tensor ranks when each of them normalises only its own heads or its own tokens. Each
    then sees only a part of the weight's gradient; the parts are summed in backward, since DeepSpeed does that for no
    replicated weight. `weight.sequence_parallel` says so to Megatron-core's own tools.
    """

    def __init__(
        self, hidden_size: int, eps: float, partial_gradient_group: ProcessGroup | None = None, **_: object
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.weight.sequence_parallel = partial_gradient_group is not None  # type: ignore[attr-defined]
        self.eps = eps
        self.partial_gradient_group = partial_gradient_group

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size] -> same shape and dtype."""
        weight = self.weight
        if self.partial_gradient_group is not None:
            weight = copy_to_tensor_model_parallel_region(weight, group=self.partial_gradient_group)
        if _in_kernels(x, weight):
            normed: Tensor = _Norm.apply(x, weight, self.eps)
            return normed
        return F.rms_norm(x.float(), weight.shape, weight.float(), self.eps).to(x.dtype)


def _in_kernels(x: Tensor, weight: Tensor) -> bool:
    if x.device.type not in KERNEL_DEVICES or x.dtype != weight.dtype or x.dtype == torch.float64:
        return False
    from biroute.model.norm_kernels import LARGEST_WIDTH

    return x.shape[-1] <= LARGEST_WIDTH


class _Norm(torch.autograd.Function):
    """Keeps the input and a number for each row; PyTorch's own would keep a copy in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        from biroute.model.norm_kernels import normalize

        x = x.contiguous()
        out, scale = normalize(x.detach(), weight.detach(), eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from biroute.model.norm_kernels import normalize_backward

        x, weight, scale = ctx.saved_tensors
        return *normalize_backward(x.detach(), weight.detach(), scale, dout.contiguous()), None
