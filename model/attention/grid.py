"""Which tokens a route stands for, and which implementation computes attention over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

AttentionPath = Literal["auto", "masked", "query_major", "region_major", "block_sparse"]

LARGEST_HEAD_OF_KERNELS = 256
# Types of devices that run the Triton kernels. Tests add one that is emulated.
KERNEL_DEVICES = {"cuda"}


@dataclass(frozen=True)
class RegionGrid:
    """Which tokens a route stands for, and how attention over it is computed.

    Attributes:
        region_size: L.
        query_block_size: Lq.
        causal: whether later tokens are masked.
        scale: of the scores.
        path: the implementation; see `bi_level_attention`.
        same_tokens: False if the keys belong to other tokens than the queries, even if their numbers are equal.
    """

    region_size: int
    query_block_size: int
    causal: bool
    scale: float
    path: AttentionPath = "auto"
    same_tokens: bool = True

    def own_region(self, num_blocks: int, device: torch.device) -> Tensor:
        """Return the region that contains each of N = `num_blocks` query blocks: int64 [N]."""
        return torch.arange(num_blocks, device=device) * self.query_block_size // self.region_size


def uses_kernels(grid: RegionGrid, q: Tensor) -> bool:
    """Return whether the Triton kernels are used: if named, or by default on CUDA for the inputs they support."""
    if grid.path != "auto":
        return grid.path == "block_sparse"
    return q.device.type in KERNEL_DEVICES and q.dtype != torch.float64 and q.shape[-1] <= LARGEST_HEAD_OF_KERNELS
