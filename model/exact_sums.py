"""Matrix products whose sums are computed in fp64 and rounded once to fp32: the same bits in any shape.

A library sums the products of one row in another order than those of a thousand, and in yet another one with two
threads or on another processor. In fp64 that order changes the 53rd bit, and the rounding to 24 bits leaves no trace
of it, but for one sum in many millions.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor


def exact_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., C] and weight [F, C] -> x @ weight.T [..., F], in x's dtype; differentiable. Exact on a CPU only."""
    if x.device.type != "cpu":
        return F.linear(x, weight)
    return (x.double() @ weight.double().t()).to(x.dtype)


class ExactColumnParallelLinear(ColumnParallelLinear):
    """Megatron-core's linear layer without a bias whose outputs are split over tensor ranks, exact on a CPU."""

    def forward(self, input_: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, None]:
        """[S, B, C] (`sequence_parallel`: [S / T, B, C]) -> [S, B, F / T], and no bias."""
        if input_.device.type != "cpu":
            out, _ = super().forward(input_, *arguments, **options)
            return out, None
        scattered = self.sequence_parallel
        whole = gather_from_sequence_parallel_region if scattered else copy_to_tensor_model_parallel_region
        return exact_product(whole(input_, group=self.tp_group), self.weight), None


class ExactRowParallelLinear(RowParallelLinear):
    """Megatron-core's linear layer without a bias whose inputs are split over tensor ranks, exact on a CPU."""

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        """[S, B, C / T] -> [S, B, F] (`sequence_parallel`: [S / T, B, F]), and no bias."""
        if input_.device.type != "cpu":
            out, _ = super().forward(input_)
            return out, None
        # The sum over tensor ranks is rounded once as well.
        part = input_.double() @ self.weight.double().t()
        scattered = self.sequence_parallel
        total = reduce_scatter_to_sequence_parallel_region if scattered else reduce_from_tensor_model_parallel_region
        return total(part, group=self.tp_group).to(input_.dtype), None
