"""Megatron-core's TransformerLayer with our attention inside.

Shapes: S tokens, B sequences, H query heads, G KV groups (both of this tensor rank), D head size, C hidden size.
"""

from __future__ import annotations

from functools import partial

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
from biroute.model.attention.bi_level import bi_level_attention, dense_attention
from biroute.model.attention.key_smear import KeySmear
from biroute.model.attention.partial import RegionGrid
from biroute.model.attention.rope import apply_rotary, rotary_tables
from biroute.model.attention.routing import RouteRule, key_descriptors, local_route, route_query_blocks
from biroute.model.norm import RMSNorm
from biroute.model.sharding import SequenceShard


def megatron_config(
    model: ModelConfig, tensor_parallel_size: int, sequence_parallel: bool = False
) -> TransformerConfig:
    """Our model configuration in Megatron-core's terms. DeepSpeed owns the pipeline, so that size stays 1."""
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_size,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
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


class CoreAttention(nn.Module):
    """Key smearing, rotary embedding, routing and attention of one layer; no weights but the smearing's.

    Built by Megatron-core's SelfAttention, which hands it queries and keys before RoPE, so that the route can be
    chosen from content alone.
    """

    def __init__(
        self,
        model: ModelConfig,
        tensor_rank: int,
        shard: SequenceShard | None,
        config: TransformerConfig,
        layer_number: int,
        **_: object,
    ) -> None:
        """`tensor_rank`: which KV groups are this rank's. `shard`: who has the rest of the sequences."""
        super().__init__()
        num_groups = model.num_kv_heads // config.tensor_model_parallel_size
        self.model = model
        self.layer = layer_number - 1
        self.kind = model.attention_kind(self.layer)
        self.first_group, self.shard = tensor_rank * num_groups, shard
        self.first_token = 0 if shard is None else shard.first_token
        self.key_smear = KeySmear(num_groups, model.head_size) if model.key_smear else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
        """query [S, B, H, D], key and value [S, B, G, D] -> [S, B, H * D]; S: this rank's tokens."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [B, heads, S, D]
        if self.key_smear is not None:
            k = self.key_smear(k, None if self.shard is None else self.shard.key_before(k, self.layer))
        tables = rotary_tables(q.shape[2], self.first_token, q.shape[3], self.model.rope_base, q.device)
        rotated_q, rotated_k = apply_rotary(q, *tables), apply_rotary(k, *tables)
        if self.kind == "dense":
            out = self._dense(rotated_q, rotated_k, v)
        else:
            before = self.model.attention.descriptor == "pre_rope"
            index = self.route(q, k) if before else self.route(rotated_q, rotated_k)
            out = self._routed(rotated_q, rotated_k, v, index)
        return out.permute(2, 0, 1, 3).flatten(2)

    def _dense(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.shard is not None:
            return self.shard.dense_attention(q, k, v, causal=self.model.causal, layer=self.layer)
        return dense_attention(q, k, v, causal=self.model.causal)

    def _routed(self, q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
        size = self.model.attention.region_size
        if self.shard is not None:
            grid = RegionGrid(size, self.query_block_size, self.model.causal, q.shape[3] ** -0.5)
            return self.shard.routed_attention(q, k, v, index, grid, self.layer)
        return bi_level_attention(
            q, k, v, index, region_size=size, query_block_size=self.query_block_size, causal=self.model.causal
        )

    @property
    def query_block_size(self) -> int:
        """Tokens that share a route; kind=local has one route per region."""
        attention = self.model.attention
        return attention.region_size if self.kind == "sliding_window" else attention.query_block_size

    def route(self, q: Tensor, k: Tensor) -> Tensor:
        """q [B, H, S, D], k [B, G, S, D] -> regions of each query block [B, G, S / Lq, topk], -1 = empty.

        The tokens are this rank's, the regions those of the whole sequence.
        """
        attention = self.model.attention
        if self.kind == "sliding_window":
            batch, groups, num_tokens, _ = k.shape
            return local_route(
                batch=batch,
                groups=groups,
                num_tokens=num_tokens,
                region_size=attention.region_size,
                query_block_size=self.query_block_size,
                topk=attention.topk,
                causal=self.model.causal,
                first_token=self.first_token,
                sequence_length=num_tokens if self.shard is None else self.shard.sequence_length,
                device=k.device,
            )
        rule = RouteRule(
            attention.region_size,
            attention.query_block_size,
            attention.topk,
            self.model.causal,
            attention.force_own,
            attention.force_previous,
            attention.attention_sink,
            attention.router,
            seed=self.layer + 1,  # of router=random: every layer draws its own routes
            descriptors_per_region=attention.descriptors_per_region,
        )
        descriptors = key_descriptors(k, attention.region_size, attention.descriptors_per_region)
        if self.shard is not None:
            descriptors = self.shard.all_key_descriptors(descriptors, self.layer)
        return route_query_blocks(q, descriptors, rule, first_token=self.first_token, first_group=self.first_group)


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
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.layer = TransformerLayer(
            megatron_config(model, groups.tp.size(), sequence_parallel),
            _submodules(model, groups, shard, sequence_parallel),
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
    model: ModelConfig, groups: ProcessGroupCollection, shard: SequenceShard | None, sequence_parallel: bool
) -> TransformerLayerSubmodules:
    """Megatron-core's layer, all local modules, our norm and our core attention."""
    norm_of_a_share = ModuleSpec(RMSNorm, params={"partial_gradient_group": groups.tp})
    norm = norm_of_a_share if sequence_parallel else RMSNorm
    head_norm = norm_of_a_share if model.qk_norm else None
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=partial(CoreAttention, model, groups.tp.rank(), shard),
        linear_proj=RowParallelLinear,
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
            submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        ),
        mlp_bda=get_bias_dropout_add,
    )
