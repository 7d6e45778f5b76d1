"""The layers for one more token of some sequences, straight from their weights.

Walking Megatron-core's modules for a single token takes several times as long as the work in them: process groups,
configurations and autograd are asked at every product. Here are the same products of the same weights in the same
order, so the results have the same bits (tests/unit/model/decode/test_step_layers.py); `LayerSequence` is the model.

Shapes: B sequences, C hidden size, H query heads, G key/value heads, r = H / G, D head size, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from biroute.model.attention.core import CoreAttention
from biroute.model.language_model import LayerSequence


class StepLayers:
    """A model's layers in one process, for steps of one token; the weights stay those of the `LayerSequence`."""

    def __init__(self, layers: LayerSequence) -> None:
        modules: Any = dict(zip(layers.names, layers.layers, strict=True))
        self._embedding: Tensor = modules["embedding"].weight
        self._blocks = [_StepBlock(modules[name].layer) for name in layers.names if name.startswith("block.")]
        self._norm = _norm(modules["norm"])
        # Tied embeddings have no head of their own.
        self._head: Tensor = modules["head"].projection.weight if "head" in modules else self._embedding

    def hidden_states(self, tokens_B: Tensor) -> Tensor:
        """One token of each sequence, int64 [B] -> what the head gets of it, [B, C].

        The attention of each layer must have a state (`CoreAttention.state`).
        """
        hidden_BC = F.embedding(tokens_B, self._embedding)
        for block in self._blocks:
            hidden_BC = block(hidden_BC)
        return self._norm(hidden_BC)

    def logits(self, hidden_BC: Tensor) -> Tensor:
        """Hidden states [B, C] -> logits [B, V]."""
        return hidden_BC @ self._head.t()


class _StepBlock:
    """One of Megatron-core's transformer layers, as `biroute.model.block` specifies it."""

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attention
        self._core: CoreAttention = attention.core_attention
        self._norms = _norm(layer.input_layernorm), _norm(layer.pre_mlp_layernorm)
        head_norms = attention.q_layernorm, attention.k_layernorm
        self._head_norms = tuple(map(_norm, head_norms)) if self._core.model.qk_norm else None
        self._qkv, self._out = attention.linear_qkv.weight, attention.linear_proj.weight
        self._up, self._down = layer.mlp.linear_fc1.weight, layer.mlp.linear_fc2.weight

    def __call__(self, hidden_BC: Tensor) -> Tensor:
        hidden_BC = hidden_BC + self._attend(self._norms[0](hidden_BC)) @ self._out.t()
        gate, up = (self._norms[1](hidden_BC) @ self._up.t()).chunk(2, -1)
        return hidden_BC + (F.silu(gate) * up) @ self._down.t()

    def _attend(self, x_BC: Tensor) -> Tensor:
        """Normalised hidden states [B, C] -> what the heads gather, [B, H * D]."""
        core = self._core
        assert core.state is not None
        # The rows of a group's query heads are followed by those of its key and of its value.
        heads_BGhD = (x_BC @ self._qkv.t()).view(x_BC.shape[0], core.num_kv_heads, -1, core.model.head_size)
        q_BHD = heads_BGhD[:, :, :-2].flatten(1, 2)
        k_BGD, v_BGD = heads_BGhD[:, :, -2], heads_BGhD[:, :, -1]
        if self._head_norms is not None:
            q_BHD, k_BGD = self._head_norms[0](q_BHD), self._head_norms[1](k_BGD)
        out = core.state.attend(core, q_BHD[:, :, None], k_BGD[:, :, None], v_BGD[:, :, None])
        return out.reshape(x_BC.shape[0], -1)


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    """Return the function of an `RMSNorm` on one tensor rank."""
    weight: Tensor = module.weight
    eps: float = module.eps

    def norm(x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)

    return norm
