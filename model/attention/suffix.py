"""Dense attention of the last tokens of a sequence over all of it: what one rank of a sharded sequence computes.

Legend: B batch, H query heads, G key/value heads, r heads of a group, S' query tokens, K key tokens, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from biroute.model.attention.partial import merge_partials

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def suffix_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """q [B, H, S', D], k, v [B, G, K, D] -> [B, H, S', D]; if causal, q are the last S' of the K tokens.

    On CUDA PyTorch's own attention with a lower-right causal mask; on the CPU, where that would materialise the mask,
    two of its flash attentions (the earlier keys, and the own ones under the triangle) merged by log-sum-exp.
    """
    grouped = q.shape[1] != k.shape[1]
    if not causal or q.shape[2] == k.shape[2]:
        return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
    if q.device.type == "cuda":
        mask = causal_lower_right(q.shape[2], k.shape[2])
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return _SuffixAttention.apply(q, k, v)


class _SuffixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs, lses = [], []
        for keys, triangle in _parts(q, k):
            k_part, v_part = (_for_heads(x[:, :, keys], q) for x in (k, v))
            out, lse = _forward(q, k_part, v_part, 0.0, triangle)
            outs.append(out)
            lses.append(lse)
        merged, lse = merge_partials(outs, lses)
        merged = merged.to(q.dtype)
        ctx.save_for_backward(q, k, v, merged, lse)
        return merged

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        dq = torch.zeros_like(q, dtype=lse.dtype)
        dks, dvs = [], []
        for keys, triangle in _parts(q, k):
            k_part, v_part = (_for_heads(x[:, :, keys], q) for x in (k, v))
            # Given the output and log-sum-exp over all keys, this gives the share of these keys.
            dq_part, dk, dv = _backward(dout, q, k_part, v_part, out, lse, 0.0, triangle)
            dq += dq_part
            dks.append(_sum_heads(dk, k))
            dvs.append(_sum_heads(dv, v))
        return dq.to(q.dtype), torch.cat(dks, 2).to(k.dtype), torch.cat(dvs, 2).to(v.dtype)


def _parts(q: Tensor, k: Tensor) -> list[tuple[slice, bool]]:
    """The earlier keys, and the queries' own ones with True: those under the causal triangle."""
    earlier = k.shape[2] - q.shape[2]
    return [(slice(0, earlier), False), (slice(earlier, k.shape[2]), True)]


def _for_heads(x_BGKD: Tensor, q: Tensor) -> Tensor:
    return x_BGKD.repeat_interleave(q.shape[1] // x_BGKD.shape[1], 1)


def _sum_heads(dx_BHKD: Tensor, x_BGKD: Tensor) -> Tensor:
    return dx_BHKD.unflatten(1, (x_BGKD.shape[1], -1)).sum(2, dtype=torch.promote_types(dx_BHKD.dtype, torch.float32))
