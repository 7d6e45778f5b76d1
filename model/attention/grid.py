"""What a route means in tokens, and which implementation attends it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

AttentionPath = Literal["auto", "masked", "query_major", "region_major", "block_sparse"]

LARGEST_HEAD_OF_KERNELS = 256


@dataclass(frozen=True)
class RegionGrid:
    """Which tokens a route means, and how attention over it is computed."""

    region_size: int
    query_block_size: int
    causal: bool
    scale: float
    path: AttentionPath = "auto"
    same_tokens: bool = True  # False: keys of other tokens than the queries, whatever their numbers look like

    def own_region(self, num_blocks: int, device: torch.device) -> Tensor:
        """The region that each query block lies in -> int64 [N]."""
        return torch.arange(num_blocks, device=device) * self.query_block_size // self.region_size


def uses_kernels(grid: RegionGrid, q: Tensor) -> bool:
    """Are the Triton kernels used: where they are named, and by default on CUDA for what they take."""
    if grid.path != "auto":
        return grid.path == "block_sparse"
    return q.device.type == "cuda" and q.dtype != torch.float64 and q.shape[-1] <= LARGEST_HEAD_OF_KERNELS
