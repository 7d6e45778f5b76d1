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


def reshard(shards: list[Tensor], dim: int, stride: int, parts: int, part: int) -> Tensor:
    """Cut the tensor whose tensor-parallel `shards` are given into `parts` others; returns number `part` of them.

    Of shards that are mapped from a file only what lies in that part is read.
    """
    in_shard = shards[0].shape[dim] // stride  # of gate or up alone
    size = in_shard * len(shards) // parts
    pieces = []
    for turn in range(stride):
        for number, shard in enumerate(shards):
            first = max(part * size - number * in_shard, 0)
            last = min((part + 1) * size - number * in_shard, in_shard)
            if first < last:
                pieces.append(shard.narrow(dim, turn * in_shard + first, last - first))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
