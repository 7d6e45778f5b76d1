"""Level two: softmax attention over the tokens of the routed regions, each exactly once; and its dense counterpart.

How it is computed: `partial.py`.

Shapes: B sequences, H query heads, G key/value heads, S tokens, D head size, Lq tokens of a query block, N query
blocks, K slots of a route.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from biroute.model.attention.grid import AttentionPath, RegionGrid, uses_kernels
from biroute.model.attention.masked import MaskedAttention
from biroute.model.attention.partial import (
    attention_delta,
    partial_attention,
    partial_attention_backward,
)
from biroute.model.attention.paths import prefers_mask
from biroute.model.attention.suffix import for_dense


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None) -> Tensor:
    """Attend to all tokens with PyTorch's own attention.

    Args:
        q: [B, H, S, D].
        k: [B, G, S, D].
        v: [B, G, S, D].
        causal: whether later tokens are masked.
        scale: of the scores; left out: 1 / sqrt(D).

    Returns:
        [B, H, S, D].
    """
    k, v = for_dense(q, k, v)
    return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def bi_level_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    route: Tensor,
    *,
    region_size: int,
    query_block_size: int,
    causal: bool,
    scale: float | None = None,
    path: AttentionPath = "auto",
    return_lse: bool = False,
) -> Any:
    """Attend every query block to the regions of its route; differentiable, and deterministic on the CPU.

    Args:
        q: [B, H, S, D], RoPE applied.
        k: [B, G, S, D], RoPE applied.
        v: [B, G, S, D].
        route: int64 [B, G, S // Lq, K], ascending, -1 = empty, as from `route_regions`.
        region_size: L.
        query_block_size: Lq.
        causal: whether later tokens are masked.
        scale: of the scores; left out: 1 / sqrt(D).
        path: "query_major" or "region_major" (`tiles.py`), "masked" (`masked.py`, for CPUs, no log-sum-exp) or
            "block_sparse" (the Triton kernels). "auto" takes the kernels on CUDA; on a CPU it takes masked where
            `prefers_mask` says so, and otherwise the one of the first two that gathers less
            (`partial.use_region_major`).
        return_lse: whether the log-sum-exp is returned too.

    Returns:
        The output [B, H, S, D] in q's dtype, or with `return_lse` the pair of it and the fp32 log-sum-exp [B, H, S].
        A query without a route gives 0 (and -inf).

    Raises:
        ValueError: shapes do not fit, a route is not ascending or out of range, or a causal route lacks a block's own
            region.

    Source: BiFormer (CVPR 2023, arXiv:2303.08810), MoBA (arXiv:2502.13189).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grid = RegionGrid(region_size, query_block_size, causal, scale, path)
    check_route(q, k, v, route, grid)
    if path == "masked" and return_lse:
        raise ValueError('path="masked" gives no log-sum-exp; use "query_major" or "region_major"')
    if path == "masked" and q.device.type != "cpu":
        raise ValueError('path="masked" is for CPUs; use "auto" or "block_sparse"')
    rows = query_block_size * q.shape[1] // k.shape[1]
    short = q.device.type == "cpu" and not return_lse and prefers_mask(q.shape[2], region_size, rows, route.shape[3])
    if path == "masked" or (path == "auto" and short):
        return MaskedAttention.apply(q, k, v, route, grid)
    out, lse = _BiLevelAttention.apply(q, k, v, route, grid)
    return (out, lse) if return_lse else out


def check_route(q: Tensor, k: Tensor, v: Tensor, route: Tensor, grid: RegionGrid) -> None:
    """Check that shapes, sizes and the form of the route fit together.

    Raises:
        ValueError: they do not.
    """
    batch, num_heads, num_tokens, head_size = q.shape
    groups, key_tokens = k.shape[1:3]
    num_blocks = num_tokens // grid.query_block_size
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != head_size or num_heads % groups:
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if key_tokens != num_tokens or num_tokens % grid.region_size or grid.region_size % grid.query_block_size:
        raise ValueError(
            f"{num_tokens} query and {key_tokens} key tokens, region_size={grid.region_size} and "
            f"query_block_size={grid.query_block_size} do not divide one another"
        )
    if route.shape[:3] != (batch, groups, num_blocks):
        raise ValueError(f"route {tuple(route.shape)} is not [{batch}, {groups}, {num_blocks}, topk]")
    if route.device.type != "cpu":
        return  # the checks below would wait for the device; routes of `route_query_blocks` pass them
    ascending = (route[..., 1:] > route[..., :-1]) | (route[..., 1:] == -1)
    if not bool(ascending.all()) or int(route.max()) >= num_tokens // grid.region_size:
        raise ValueError("route is not ascending with -1 last, or names a region that is not there")
    own_N1 = grid.own_region(num_blocks, route.device)[:, None]
    if grid.causal and not bool((route == own_N1).any(-1).all()):
        raise ValueError("a causal route must hold every block's own region")


class _BiLevelAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, route: Tensor, grid: RegionGrid) -> tuple[Tensor, Tensor]:
        # Detached: views of what requires a gradient are slower to make.
        out, lse = partial_attention(q.detach(), k.detach(), v.detach(), route, grid)
        # The kernels take 32 bits: half the memory, for as long as the layer waits for backward.
        kept = route.int() if uses_kernels(grid, q) else route
        ctx.save_for_backward(q, k, v, kept, out, lse)
        ctx.grid = grid
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, route, out, lse = (x.detach() for x in ctx.saved_tensors)
        dout = torch.zeros_like(out) if dout is None else dout
        delta = attention_delta(out, dout)
        if dlse is not None:
            delta -= dlse
        dq, dk, dv = partial_attention_backward(q, k, v, route, ctx.grid, dout=dout, lse=lse, delta=delta)
        return dq, dk, dv, None, None
