"""Rotary position embedding (RoFormer, arXiv:2104.09864), the half-split form that Llama uses."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=8)
def rotary_tables(
    num_positions: int, first_position: int, head_size: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [num_positions, head_size / 2] fp32, of positions from `first_position` on.

    Angle of pair i at position t: t * base^(-2i / head_size). Cached rather than kept as a module buffer, which
    a cast of the module to bf16 would round.
    """
    # fp64 angles: in fp32 the angle of position 10^6 is already off by 0.06.
    inverse_wavelength = base ** (-torch.arange(0, head_size, 2, dtype=torch.float64, device=device) / head_size)
    positions = torch.arange(first_position, first_position + num_positions, dtype=torch.float64, device=device)
    angles = torch.outer(positions, inverse_wavelength)
    return angles.cos().float(), angles.sin().float()


def apply_rotary(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of `x` [..., S, D] by the angles of its S positions; same shape and dtype."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)
    return turned.to(x.dtype)
