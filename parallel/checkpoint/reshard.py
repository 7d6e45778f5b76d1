"""Tensor-parallel shards of a weight joined, and cut for another number of ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def join(shards: list[Tensor], split: tuple[int, int] | None) -> Tensor:
    """Join the shards of all tensor ranks, in their order; `split`: dimension and stride, None where each is whole.

    With stride 2 (SwiGLU's gate and up projections) a shard is [its gate rows; its up rows].
    """
    if split is None or len(shards) == 1:
        return shards[0]
    dim, stride = split
    pieces = [shard.chunk(stride, dim) for shard in shards]
    return torch.cat([torch.cat([piece[turn] for piece in pieces], dim) for turn in range(stride)], dim)


def reshard(shards: list[Tensor], dim: int, stride: int, parts: int) -> list[Tensor]:
    """Cut the tensor whose tensor-parallel `shards` are given into `parts` others."""
    cut = [whole.chunk(parts, dim) for whole in join(shards, (dim, stride)).chunk(stride, dim)]
    return [torch.cat([turn[part] for turn in cut], dim) for part in range(parts)]
