"""Dense attention of the last tokens of a sequence over all of it: what a context-parallel rank computes.

Shapes: B sequences, H query heads, G key/value heads, S query tokens, Sk key tokens, D head size.
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


def for_dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat keys and values for every query head where PyTorch's attention would otherwise need S * Sk memory.

    That is fp32 on a GPU: its kernels for 32 bits take no grouped heads.
    """
    if q.device.type == "cpu" or q.dtype != torch.float32 or q.shape[1] == k.shape[1]:
        return k, v
    return tuple(x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))  # type: ignore[return-value]


def suffix_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Attend the last S of Sk tokens to all tokens (causal), or any S queries to Sk keys (not causal).

    On CUDA this is PyTorch's own attention with a lower-right causal mask. On the CPU, where that would materialise
    the mask, the results of two flash attentions are merged by log-sum-exp: over the earlier keys, and over the
    queries' own keys with a causal mask.

    Args:
        q: [B, H, S, D].
        k: [B, G, Sk, D].
        v: [B, G, Sk, D].
        causal: whether later tokens are masked.

    Returns:
        [B, H, S, D].
    """
    k, v = for_dense(q, k, v)
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
        for keys, is_causal in _parts(q, k):
            k_part, v_part = (_for_heads(x[:, :, keys], q) for x in (k, v))
            out, lse = _forward(q, k_part, v_part, 0.0, is_causal)
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
        for keys, is_causal in _parts(q, k):
            k_part, v_part = (_for_heads(x[:, :, keys], q) for x in (k, v))
            # Given the output and log-sum-exp over all keys, this is what these keys contribute to the gradients.
            dq_part, dk, dv = _backward(dout, q, k_part, v_part, out, lse, 0.0, is_causal)
            dq += dq_part
            dks.append(_sum_heads(dk, k))
            dvs.append(_sum_heads(dv, v))
        return dq.to(q.dtype), torch.cat(dks, 2).to(k.dtype), torch.cat(dvs, 2).to(v.dtype)


def _parts(q: Tensor, k: Tensor) -> list[tuple[slice, bool]]:
    """Return the earlier keys, with False, and the queries' own keys, with True: these need a causal mask."""
    earlier = k.shape[2] - q.shape[2]
    return [(slice(0, earlier), False), (slice(earlier, k.shape[2]), True)]


def _for_heads(x_BGSD: Tensor, q: Tensor) -> Tensor:
    return x_BGSD.repeat_interleave(q.shape[1] // x_BGSD.shape[1], 1)


def _sum_heads(dx_BHSD: Tensor, x_BGSD: Tensor) -> Tensor:
    return dx_BHSD.unflatten(1, (x_BGSD.shape[1], -1)).sum(2, dtype=torch.promote_types(dx_BHSD.dtype, torch.float32))
