"""Megatron-core's TransformerLayer with our attention inside.

Shapes: S tokens, B sequences, H query heads, G key/value heads (both of this tensor rank), D head size,
C hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from biroute.configs.schema import ModelConfig
from biroute.model.attention.core import CoreAttention
from biroute.model.attention.sequence_shard import SequenceShard
from biroute.model.exact_sums import ExactColumnParallelLinear, ExactRowParallelLinear
from biroute.model.norm import RMSNorm
from biroute.model.swiglu import SwiGLU


def megatron_config(
    model: ModelConfig, tensor_parallel_size: int, sequence_parallel: bool = False, draw_weights: bool = True
) -> TransformerConfig:
    """Our model configuration in Megatron-core's terms. DeepSpeed owns the pipeline, so that size stays 1.

    Without `draw_weights` every matrix is NaN until it is loaded.
    """
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_size,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm",
        qk_layernorm=model.qk_norm,  # from Megatron-core 0.19 on it must say what the layer spec has
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # the MLP calls the activation of its layer spec, `SwiGLU`
        add_bias_linear=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,  # needs apex, and DeepSpeed owns the gradient buffers
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        tensor_model_parallel_size=tensor_parallel_size,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,  # the whole weight from one seed, then sliced: every layout starts equal
        params_dtype=torch.float32,
    )
    for name in ("init_method", "output_layer_init_method"):
        setattr(config, name, drawn_on_cpu(getattr(config, name)) if draw_weights else fill_with_nan)
    return config


def fill_with_nan(weight: Tensor) -> Tensor:
    """Initialise a weight that is to be loaded: drawing it would take minutes, and what is not loaded must show."""
    return nn.init.constant_(weight, math.nan)


def drawn_on_cpu(draw: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """Return an initialisation that draws fp32 numbers on the CPU, wherever the weight lies and whatever it is.

    Under ZeRO-3 DeepSpeed makes every new tensor one of the run's precision on the rank's device: other random
    numbers than those that the other layouts draw.
    """

    def fill(weight: Tensor) -> Tensor:
        with torch.no_grad():
            drawn = weight.new_empty(weight.shape, dtype=torch.float32, device="cpu")
            draw(drawn)
            return weight.copy_(drawn)

    return fill


class MegatronCoreAttention(CoreAttention):
    """Our core attention as Megatron-core's SelfAttention builds and calls it."""

    def __init__(
        self,
        model: ModelConfig,
        tensor_rank: int,
        shard: SequenceShard | None,
        exact: bool,
        config: TransformerConfig,
        layer_number: int,
        **_megatron: object,  # mask type, softmax scale and the like: Megatron passes more with each version
    ) -> None:
        kv_heads = model.num_kv_heads // config.tensor_model_parallel_size
        super().__init__(
            model,
            layer_number - 1,
            num_kv_heads=kv_heads,
            first_kv_head=tensor_rank * kv_heads,
            shard=shard,
            exact=exact,
        )

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object = None,
    ) -> Tensor:
        """query [S, B, H, D], key and value [S, B, G, D] -> [S, B, H * D]; S: this rank's tokens.

        Raises:
            ValueError: Megatron-core passes a mask, a bias or packed sequences, which routing would not see.
        """
        if attention_mask is not None or attention_bias is not None or packed_seq_params is not None:
            raise ValueError("routed attention takes no attention mask, bias or packed sequences")
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [B, heads, S, D]
        return super().forward(q, k, v).permute(2, 0, 1, 3).flatten(2)


class Block(nn.Module):
    """One transformer layer, [S, B, C] -> [S, B, C]; recomputed in backward if asked.

    With `sequence_parallel` S counts the tokens of this tensor rank, a share of those that attention sees.
    """

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        groups: ProcessGroupCollection,
        activation_checkpointing: bool = False,
        shard: SequenceShard | None = None,
        sequence_parallel: bool = False,
        exact_sums: bool = False,
        draw_weights: bool = True,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.layer = TransformerLayer(
            megatron_config(model, groups.tp.size(), sequence_parallel, draw_weights),
            _submodules(model, groups, shard, sequence_parallel, exact_sums),
            layer_number=layer + 1,
            pg_collection=groups,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            # No dropout and a route that follows from q and k: no random state to restore.
            return checkpoint(self._forward, hidden, use_reentrant=False, preserve_rng_state=False)
        return self._forward(hidden)

    def _forward(self, hidden: Tensor) -> Tensor:
        return self.layer(hidden)[0]


def _submodules(
    model: ModelConfig,
    groups: ProcessGroupCollection,
    shard: SequenceShard | None,
    sequence_parallel: bool,
    exact_sums: bool,
) -> TransformerLayerSubmodules:
    """Megatron-core's layer, all local modules, our norm and our core attention."""
    norm_of_a_share = ModuleSpec(RMSNorm, params={"partial_gradient_group": groups.tp})
    norm = norm_of_a_share if sequence_parallel else RMSNorm
    head_norm = norm_of_a_share if model.qk_norm else None
    column = ExactColumnParallelLinear if exact_sums else ColumnParallelLinear
    row = ExactRowParallelLinear if exact_sums else RowParallelLinear
    attention = SelfAttentionSubmodules(
        linear_qkv=column,
        core_attention=partial(MegatronCoreAttention, model, groups.tp.rank(), shard, exact_sums),
        linear_proj=row,
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    return TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=ModuleSpec(
            module=SelfAttention, params={"attn_mask_type": AttnMaskType.no_mask}, submodules=attention
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=norm,
        mlp=ModuleSpec(
            module=MLP,
            submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row, activation_func=SwiGLU),
        ),
        mlp_bda=get_bias_dropout_add,
    )
