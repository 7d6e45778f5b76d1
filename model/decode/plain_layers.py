"""The layers of a model in one process, straight from their weights, without gradients.

Walking Megatron-core's modules for a single token takes several times as long as the work in them: process groups,
configurations and autograd are asked at every product. Here are the same products of the same weights in the same
order; `LayerSequence` is the model, and tests hold both together to the bit.

Shapes: T tokens (of one sequence, or one of each of some), C hidden size, H query heads, G key/value heads, h = H / G
+ 2 projected heads of a group, D head size, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from biroute.model.attention.core import AttentionState, CoreAttention
from biroute.model.language_model import LayerSequence

Product = Callable[[Tensor], Tensor]  # [T, inputs] -> [T, outputs]


class HeadsState(AttentionState, Protocol):
    """An `AttentionState` that also takes the heads of a layer as its projection leaves them, side by side."""

    def attend_heads(self, core: CoreAttention, heads_TGhD: Tensor) -> Tensor:
        """Attend as `attend` does: a group's query heads are followed by its key and its value; gives [T, H * D]."""


class PlainLayers:
    """Embedding, blocks, norm and head of a `LayerSequence`, as functions of its weights.

    Each layer attends by the state of its `CoreAttention`, which must be a `HeadsState`.
    """

    def __init__(self, layers: LayerSequence, *, exact: bool) -> None:
        """Take the weights as they are now.

        Args:
            layers: of the model, all in this process.
            exact: sum products in fp64 and round once, as `biroute.model.exact_sums`, so that a token has the same
                bits in any number of tokens. Takes a copy of the weights in fp64.
        """
        modules: Any = dict(zip(layers.names, layers.layers, strict=True))
        self._embedding: Tensor = modules["embedding"].weight
        blocks = [modules[name] for name in layers.names if name.startswith("block.")]
        self._blocks = [_PlainBlock(block.layer, exact) for block in blocks]
        self._norm = _norm(modules["norm"])
        # Tied embeddings have no head of their own.
        self._head = _product(modules["head"].projection if "head" in modules else modules["embedding"], exact)

    def hidden_states(self, tokens_T: Tensor) -> Tensor:
        """Tokens, int64 [T] -> what the head gets, [T, C]."""
        hidden_TC = torch.embedding(self._embedding, tokens_T)
        for block in self._blocks:
            hidden_TC = block(hidden_TC)
        return self._norm(hidden_TC)

    def logits(self, hidden_TC: Tensor) -> Tensor:
        """Hidden states [T, C] -> fp32 logits [T, V]."""
        return self._head(hidden_TC).float()


class _PlainBlock:
    """One of Megatron-core's transformer layers, as `biroute.model.block` specifies it."""

    def __init__(self, layer: Any, exact: bool) -> None:
        attention, mlp = layer.self_attention, layer.mlp
        self._core: CoreAttention = attention.core_attention
        self._norms = _norm(layer.input_layernorm), _norm(layer.pre_mlp_layernorm)
        head_norms = attention.q_layernorm, attention.k_layernorm
        self._head_norms = tuple(map(_norm, head_norms)) if self._core.model.qk_norm else None
        self._qkv, self._out = _product(attention.linear_qkv, exact), _product(attention.linear_proj, exact)
        self._up, self._down = _product(mlp.linear_fc1, exact), _product(mlp.linear_fc2, exact)

    def __call__(self, hidden_TC: Tensor) -> Tensor:
        hidden_TC = self._out(self._attend(self._norms[0](hidden_TC))).add_(hidden_TC)
        gate, up = self._up(self._norms[1](hidden_TC)).chunk(2, -1)
        return self._down(F.silu(gate).mul_(up)).add_(hidden_TC)

    def _attend(self, x_TC: Tensor) -> Tensor:
        """Normalised hidden states [T, C] -> what the heads gather, [T, H * D]."""
        core = self._core
        state: HeadsState = core.state  # type: ignore[assignment]  # CachedModel sets no other
        assert state is not None, "the layer has no pages"
        heads_TGhD = self._qkv(x_TC).view(x_TC.shape[0], core.num_kv_heads, -1, core.model.head_size)
        if self._head_norms is not None:
            q, k, v = heads_TGhD.split((heads_TGhD.shape[2] - 2, 1, 1), 2)
            heads_TGhD = torch.cat((self._head_norms[0](q), self._head_norms[1](k), v), 2)
        return state.attend_heads(core, heads_TGhD)


def _product(module: Any, exact: bool) -> Product:
    """Return the product with the weight of a linear module, in fp64 rounded once if `exact`."""
    weight: Tensor = module.weight.detach()
    if not exact:
        turned = weight.t()
        return lambda x: torch.mm(x, turned)
    in_fp64 = weight.double().t()
    return lambda x: torch.mm(x.double(), in_fp64).to(x.dtype)


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    """Return the function of an `RMSNorm` on one tensor rank."""
    weight: Tensor = module.weight.detach().float()
    if weight.device.type != "cpu":
        return lambda x: F.rms_norm(x.float(), weight.shape, weight, module.eps).to(x.dtype)
    # Its operations, with its bits, in half the time: numbers that are tensors already need not be made into some.
    count, eps = weight.new_tensor(len(weight)), weight.new_tensor(module.eps)

    def norm(x: Tensor) -> Tensor:
        whole = x.float()
        scale = (whole * whole).sum(-1, True).div_(count).add_(eps).rsqrt_()
        return (whole * scale).mul_(weight).to(x.dtype)

    return norm
