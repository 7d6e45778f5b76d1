"""Rotary position embedding (RoFormer, arXiv:2104.09864), the half-split form that Llama uses."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

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
    """Turn the pairs (i, i + D/2) of `x` [..., S, D] by the angles of its S positions; same shape and dtype.

    The result is contiguous, whatever the layout of `x`. Differentiable in `x`.
    """
    turned: Tensor = _Rotation.apply(x, cosines, sines)
    return turned


class _Rotation(torch.autograd.Function):
    """Written out, because autograd's own backward makes several times as many passes over the queries."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _rotate(x.detach(), cosines, sines, 1.0)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cosines, sines = ctx.saved_tensors
        return _rotate(dout, cosines, sines, -1.0), None, None


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor, direction: float) -> Tensor:
    """Turn by the angles, or back again with `direction` -1."""
    # Products and sums apart, each rounded by itself: a fused one rounds by the place in memory.
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    (first, second), (rotated_first, rotated_second) = (y.chunk(2, dim=-1) for y in (x.float(), out))
    product = second * sines
    torch.mul(first, cosines, out=rotated_first).sub_(product, alpha=direction)
    torch.mul(first, sines, out=product)
    torch.mul(second, cosines, out=rotated_second).add_(product, alpha=direction)
    return out.to(x.dtype)
