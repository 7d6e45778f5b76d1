"""The layers of a model in one process, straight from their weights, without gradients.

Walking Megatron-core's modules for a single token takes several times as long as the work in them: process groups,
configurations and autograd are asked at every product. Here are the same products of the same weights in the same
order; `LayerSequence` is the model, and tests hold both together to the bit.

Shapes: B sequences, S tokens, C hidden size, H query heads, G key/value heads, r = H / G, D head size, V padded
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from biroute.model.attention.core import CoreAttention
from biroute.model.language_model import LayerSequence

Product = Callable[[Tensor], Tensor]  # [..., inputs] -> [..., outputs]


class PlainLayers:
    """Embedding, blocks, norm and head of a `LayerSequence`, as functions of its weights.

    Each layer attends by the state of its `CoreAttention`, which must be set.
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

    def hidden_states(self, tokens_BS: Tensor) -> Tensor:
        """Tokens, int64 [B, S] -> what the head gets, [B, S, C]."""
        hidden_BSC = F.embedding(tokens_BS, self._embedding)
        for block in self._blocks:
            hidden_BSC = block(hidden_BSC)
        return self._norm(hidden_BSC)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., C] -> fp32 logits [..., V]."""
        return self._head(hidden).float()


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

    def __call__(self, hidden_BSC: Tensor) -> Tensor:
        hidden_BSC = hidden_BSC + self._out(self._attend(self._norms[0](hidden_BSC)))
        gate, up = self._up(self._norms[1](hidden_BSC)).chunk(2, -1)
        return hidden_BSC + self._down(F.silu(gate) * up)

    def _attend(self, x_BSC: Tensor) -> Tensor:
        """Normalised hidden states [B, S, C] -> what the heads gather, [B, S, H * D]."""
        core = self._core
        assert core.state is not None, "the layer has no pages"
        # The rows of a group's query heads are followed by those of its key and of its value.
        heads_BSGhD = self._qkv(x_BSC).unflatten(2, (core.num_kv_heads, -1, core.model.head_size))
        q_BSHD = heads_BSGhD[:, :, :, :-2].flatten(2, 3)
        k_BSGD, v_BSGD = heads_BSGhD[:, :, :, -2], heads_BSGhD[:, :, :, -1]
        if self._head_norms is not None:
            q_BSHD, k_BSGD = self._head_norms[0](q_BSHD), self._head_norms[1](k_BSGD)
        out_BHSD = core.state.attend(core, *(x.transpose(1, 2) for x in (q_BSHD, k_BSGD, v_BSGD)))
        return out_BHSD.transpose(1, 2).flatten(2)


def _product(module: Any, exact: bool) -> Product:
    """Return the product with the weight of a linear module, in fp64 rounded once if `exact`."""
    weight: Tensor = module.weight.detach()
    if not exact:
        return lambda x: x @ weight.t()
    in_fp64 = weight.double()
    return lambda x: (x.double() @ in_fp64.t()).to(x.dtype)


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    """Return the function of an `RMSNorm` on one tensor rank."""
    weight: Tensor = module.weight.detach()
    eps: float = module.eps

    def norm(x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)

    return norm
