"""The small model of the recall benchmark: plain torch around the product's own routing, so that it starts at once.

Pre-norm blocks of attention with RoPE and an MLP.

Legend: B batch, H query heads, G KV groups, S tokens, D head size, C hidden size, N query blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor, nn

from biroute.launcher.bench.recall.masked_attention import masked_attention
from biroute.model.attention.bi_level import bi_level_attention, dense_attention
from biroute.model.attention.key_smear import KeySmear
from biroute.model.attention.rope import apply_rotary, rotary_tables
from biroute.model.attention.routing import Router, local_route, route_regions


@dataclass(frozen=True)
class Variant:
    """What a row of the benchmark tries: how the layers that are not in `dense_layers` choose what they see."""

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
        """Tokens that a late query sees, as a share of the sequence; of layers that are not dense."""
        return 1.0 if self.kind == "dense" else min(1.0, self.region_size * self.topk / sequence_length)


@dataclass(frozen=True)
class ModelSize:
    """Sizes of the small model."""

    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 32


class RecallAttention(nn.Module):
    """Attention of one layer, [B, S, C] -> [B, S, C].

    Attributes:
        router: affinity or random, may be changed at any time. through_mask: compute by a mask or by the product's
        `bi_level_attention`; the same to rounding.
    """

    def __init__(self, size: ModelSize, variant: Variant, layer: int) -> None:
        super().__init__()
        self.size, self.variant, self.layer = size, variant, layer
        self.kind = "dense" if layer in variant.dense_layers else variant.kind
        self.router: Router = "affinity"
        self.through_mask = True
        width = size.num_kv_heads * size.head_size
        self.widths = (size.num_heads * size.head_size, width, width)
        self.project = nn.Linear(size.hidden_size, sum(self.widths), bias=False)
        self.out = nn.Linear(self.widths[0], size.hidden_size, bias=False)
        self.key_smear = KeySmear(size.num_kv_heads, size.head_size) if variant.key_smear else None

    def forward(self, x_BSC: Tensor) -> Tensor:
        q, k, v = (
            x.unflatten(2, (-1, self.size.head_size)).transpose(1, 2)
            for x in self.project(x_BSC).split(self.widths, dim=-1)
        )
        if self.key_smear is not None:
            k = self.key_smear(k)
        tables = rotary_tables(q.shape[2], 0, q.shape[3], 10_000.0, q.device)
        rotated_q, rotated_k = apply_rotary(q, *tables), apply_rotary(k, *tables)
        if self.kind == "dense":
            out = dense_attention(rotated_q, rotated_k, v, causal=True)
        else:
            before = self.variant.descriptor == "pre_rope"
            index = self.route(q, k) if before else self.route(rotated_q, rotated_k)
            region_size, lq = self.variant.region_size, self._query_block_size
            attend = masked_attention if self.through_mask else partial(bi_level_attention, causal=True)
            out = attend(rotated_q, rotated_k, v, index, region_size=region_size, query_block_size=lq)
        return self.out(out.transpose(1, 2).flatten(2))

    @property
    def _query_block_size(self) -> int:
        return self.variant.region_size if self.kind == "sliding_window" else self.variant.query_block_size

    def route(self, q: Tensor, k: Tensor) -> Tensor:
        """q [B, H, S, D], k [B, G, S, D] -> regions of each query block [B, G, N, topk], -1 = empty."""
        variant = self.variant
        if self.kind == "sliding_window":
            return local_route(
                batch=k.shape[0],
                groups=k.shape[1],
                num_tokens=k.shape[2],
                region_size=variant.region_size,
                query_block_size=self._query_block_size,
                topk=variant.topk,
                causal=True,
            )
        return route_regions(
            q,
            k,
            region_size=variant.region_size,
            query_block_size=variant.query_block_size,
            topk=variant.topk,
            causal=True,
            force_previous=variant.force_previous,
            router=self.router,
            seed=self.layer + 1,
            descriptors_per_region=variant.descriptors_per_region,
        )


class RecallModel(nn.Module):
    """Tokens [B, S] -> hidden states [B, S, C] after the last norm; `logits` gives those of chosen positions."""

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
        """Logits [B, Q, V] at the positions of the questions."""
        hidden_BSC = self(tokens_BS)
        place_BQC = position_BQ[..., None].expand(-1, -1, hidden_BSC.shape[2])
        return self.head(hidden_BSC.gather(1, place_BQC))

    def attentions(self) -> Iterator[RecallAttention]:
        """The attention of each layer."""
        for attention in self.attention:
            assert isinstance(attention, RecallAttention)
            yield attention

    def set_router(self, router: Router) -> None:
        """How all layers choose from now on."""
        for attention in self.attentions():
            attention.router = router

    def set_path(self, through_mask: bool) -> None:
        """Compute routed attention by a mask, or by the product's `bi_level_attention`."""
        for attention in self.attentions():
            attention.through_mask = through_mask
