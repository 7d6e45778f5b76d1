"""Rotary position embedding (RoFormer, arXiv:2104.09864), the half-split form that Llama uses."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from biroute.model.attention.grid import KERNEL_DEVICES


@lru_cache(maxsize=8)
def rotary_tables(
    num_positions: int, first_position: int, head_size: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Compute cosines and sines of the angle t * base^(-2i / D) of pair i at position t.

    They are cached and no buffers of a module, because a cast of the module to bf16 would round those.

    Args:
        num_positions: S.
        first_position: the first t.
        head_size: D.
        base: of the wavelengths.
        device: of the results.

    Returns:
        Cosines and sines, fp32 [S, D / 2] each.
    """
    # fp64 angles: in fp32 the angle of position 10^6 is already off by 0.06.
    inverse_wavelength = base ** (-torch.arange(0, head_size, 2, dtype=torch.float64, device=device) / head_size)
    positions = torch.arange(first_position, first_position + num_positions, dtype=torch.float64, device=device)
    angles = torch.outer(positions, inverse_wavelength)
    return angles.cos().float(), angles.sin().float()


@lru_cache(maxsize=8)
def whole_head_tables(num_positions: int, head_size: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return `rotary_tables` for every element of a head, as `rotate_token` takes them.

    Returns:
        fp32 [S, D] each: the cosines twice, and the negative sines before the sines.
    """
    cosines, sines = rotary_tables(num_positions, 0, head_size, base, device)
    return torch.cat((cosines, cosines), 1), torch.cat((-sines, sines), 1)


@lru_cache(maxsize=64)
def token_rows(
    position: int, num_positions: int, head_size: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the rows of `whole_head_tables` for one position, [D] each; all layers ask for the same."""
    cosines, sines = whole_head_tables(num_positions, head_size, base, device)
    return cosines[position], sines[position]


def apply_rotary(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of each token by the angles of its position; differentiable in `x`.

    Args:
        x: [..., S, D].
        cosines: [S, D / 2], from `rotary_tables`.
        sines: [S, D / 2].

    Returns:
        [..., S, D] in x's dtype; contiguous, whatever the layout of `x`.

    Source: RoFormer (arXiv:2104.09864), equation 34.
    """
    turned: Tensor = _Rotation.apply(x, cosines, sines)
    return turned


class _Rotation(torch.autograd.Function):
    """Its backward is written out, because autograd's own would read the queries several times as often."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return rotate(x.detach(), cosines, sines)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cosines, sines = ctx.saved_tensors
        # As the projections have it, which a layer's queries and keys are views of: it need not be copied for them.
        return rotate(dout, cosines, sines, -1.0, by_token=True), None, None


def rotate(x: Tensor, cosines: Tensor, sines: Tensor, direction: float = 1.0, *, by_token: bool = False) -> Tensor:
    """Rotate as `apply_rotary` does, without autograd; by the negative angles with `direction` -1.

    With `by_token` the result of a GPU's kernel lies in memory token by token.
    """
    if x.device.type in KERNEL_DEVICES and x.dtype != torch.float64 and x.dim() == 4:
        from biroute.model.attention.block_sparse import rotary

        return rotary.rotate(x, cosines, sines, direction, by_token=by_token)
    # Products and sums are separate operations, each rounded: whether a fused one is used would depend on the memory
    # layout.
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    (first, second), (rotated_first, rotated_second) = (y.chunk(2, dim=-1) for y in (x.float(), out))
    product = second * sines
    torch.mul(first, cosines, out=rotated_first).sub_(product, alpha=direction)
    torch.mul(first, sines, out=product)
    torch.mul(second, cosines, out=rotated_second).add_(product, alpha=direction)
    return out.to(x.dtype)


def rotate_token(x: Tensor, cosines_D: Tensor, sines_D: Tensor) -> Tensor:
    """Rotate the heads [..., D] of one token, by its rows of `whole_head_tables`.

    The bits of `rotate`, in half as many operations: a - b and a + (-b) are the same number.
    """
    swapped = x.roll(x.shape[-1] // 2, -1)
    return (x * cosines_D).add_(swapped * sines_D).to(x.dtype)
