"""The small model of the recall benchmark: plain torch around BiRoute's core attention, so that it starts fast.

Its blocks are pre-norm, with attention (with RoPE) and an MLP.

Legend: B batch, H query heads, G key/value heads, S tokens, D head size, C hidden size, N query blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from biroute.configs.schema import AttentionConfig, ModelConfig
from biroute.launcher.bench.recall.masked_attention import masked_attention
from biroute.model.attention.core import CoreAttention
from biroute.model.attention.rule import Router


@dataclass(frozen=True)
class Variant:
    """A row of the benchmark: how the layers outside `dense_layers` choose the tokens that they attend to."""

    name: str
    kind: Literal["bi_level", "dense", "sliding_window"] = "bi_level"
    region_size: int = 4
    query_block_size: int = 1
    topk: int = 8
    descriptor: Literal["pre_rope", "post_rope"] = "pre_rope"
    dense_layers: tuple[int, ...] = ()
    descriptors_per_region: int = 1
    key_smear: bool = True
    force_previous: bool = True

    def share_of_tokens(self, sequence_length: int) -> float:
        """Return the fraction of the sequence that a late query attends to in the layers outside `dense_layers`."""
        return 1.0 if self.kind == "dense" else min(1.0, self.region_size * self.topk / sequence_length)


@dataclass(frozen=True)
class ModelSize:
    """Sizes of the small model."""

    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 32


class RecallCore(CoreAttention):
    """BiRoute's core attention, which can also compute routed attention with one mask for the whole batch.

    Attributes:
        through_mask: whether to use the mask; the result is the same up to rounding.
    """

    through_mask = True

    def _routed(self, q: Tensor, k: Tensor, v: Tensor, route: Tensor) -> Tensor:
        if not self.through_mask:
            return super()._routed(q, k, v, route)
        region_size = self.model.attention.region_size
        return masked_attention(q, k, v, route, region_size=region_size, query_block_size=self.query_block_size)


def model_config(size: ModelSize, variant: Variant) -> ModelConfig:
    """Return BiRoute's model configuration of a variant."""
    attention = AttentionConfig(
        kind=variant.kind,
        region_size=variant.region_size,
        query_block_size=variant.query_block_size,
        topk=variant.topk,
        descriptor=variant.descriptor,
        descriptors_per_region=variant.descriptors_per_region,
        force_previous=variant.force_previous,
    )
    return ModelConfig(
        hidden_size=size.hidden_size,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        num_kv_heads=size.num_kv_heads,
        head_size=size.head_size,
        sequence_length=variant.region_size,  # not used here: each batch has its own length
        key_smear=variant.key_smear,
        dense_layers=variant.dense_layers,
        attention=attention,
    )


class RecallAttention(nn.Module):
    """The attention of one layer with its projections: [B, S, C] -> [B, S, C]."""

    def __init__(self, size: ModelSize, variant: Variant, layer: int) -> None:
        super().__init__()
        self.head_size = size.head_size
        width = size.num_kv_heads * size.head_size
        self.widths = (size.num_heads * size.head_size, width, width)
        self.project = nn.Linear(size.hidden_size, sum(self.widths), bias=False)
        self.out = nn.Linear(self.widths[0], size.hidden_size, bias=False)
        self.core = RecallCore(model_config(size, variant), layer, num_kv_heads=size.num_kv_heads)

    def forward(self, x_BSC: Tensor) -> Tensor:
        q, k, v = (
            x.unflatten(2, (-1, self.head_size)).transpose(1, 2)
            for x in self.project(x_BSC).split(self.widths, dim=-1)
        )
        return self.out(self.core(q, k, v).transpose(1, 2).flatten(2))


class RecallModel(nn.Module):
    """A transformer from tokens [B, S] to hidden states [B, S, C]; `logits` computes those of chosen positions."""

    def __init__(self, vocab_size: int, size: ModelSize, variant: Variant) -> None:
        super().__init__()
        hidden = size.hidden_size
        self.embedding = nn.Embedding(vocab_size, hidden)
        self.attention = nn.ModuleList(RecallAttention(size, variant, layer) for layer in range(size.num_layers))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))
            for _ in range(size.num_layers)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(2 * size.num_layers + 1))
        self.head = nn.Linear(hidden, vocab_size, bias=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x_BSC = self.embedding(tokens_BS)
        for layer, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            x_BSC = x_BSC + attention(self.norms[2 * layer](x_BSC))
            x_BSC = x_BSC + mlp(self.norms[2 * layer + 1](x_BSC))
        return self.norms[-1](x_BSC)

    def logits(self, tokens_BS: Tensor, position_BQ: Tensor) -> Tensor:
        """Compute the logits [B, Q, V] at the positions [B, Q] of the questions."""
        hidden_BSC = self(tokens_BS)
        place_BQC = position_BQ[..., None].expand(-1, -1, hidden_BSC.shape[2])
        return self.head(hidden_BSC.gather(1, place_BQC))

    def cores(self) -> Iterator[RecallCore]:
        """Yield the core attention of each layer."""
        for attention in self.attention:
            assert isinstance(attention, RecallAttention)
            yield attention.core

    def set_router(self, router: Router) -> None:
        """Set the router of all layers that route."""
        for core in self.cores():
            if core.rule is not None:
                core.rule = replace(core.rule, router=router)

    def set_path(self, through_mask: bool) -> None:
        """Select whether routed attention uses a mask or `bi_level_attention`."""
        for core in self.cores():
            core.through_mask = through_mask
