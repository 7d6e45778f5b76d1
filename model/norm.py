"""RMSNorm (arXiv:1910.07467) with the signature that Megatron-core's layers build norms by."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import Tensor, nn
from torch.distributed import ProcessGroup


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32.

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
        if x.device.type != "cpu" and x.dtype == weight.dtype:
            # PyTorch's kernel sums in fp32 whatever the inputs are, and keeps no copy of them in fp32.
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.rms_norm(x.float(), weight.shape, weight.float(), self.eps).to(x.dtype)
