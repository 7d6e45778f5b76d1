"""Reference implementations of routing and attention, for tests only: plain loops, a boolean mask, fp64.

Shapes: B sequences, H query heads, G key/value heads, r query heads of a key/value head, S tokens, D head size, L
tokens of a region, R regions, Lq tokens of a query block, N query blocks, K slots of a route.
"""

from __future__ import annotations

import torch
from torch import Tensor

from biroute.model.attention.rule import RouteRule


@torch.no_grad()
def route_regions(q: Tensor, k: Tensor, rule: RouteRule) -> Tensor:
    """Choose the regions of every query block.

    Affinities are compared in fp32, as in `biroute.model.attention.routing`.

    Args:
        q: [B, H, S, D].
        k: [B, G, S, D].
        rule: how regions are chosen; the router is "affinity".

    Returns:
        The route, int64 [B, G, S // Lq, K], ascending, -1 = empty.

    Source: BiFormer (CVPR 2023, arXiv:2303.08810), MoBA (arXiv:2502.13189).
    """
    batch, num_heads, num_tokens, _ = q.shape
    groups = k.shape[1]
    rep = num_heads // groups
    region_size, query_block_size, topk, causal = rule.region_size, rule.query_block_size, rule.topk, rule.causal
    num_regions, num_blocks = num_tokens // region_size, num_tokens // query_block_size
    part = region_size // rule.descriptors_per_region
    route = torch.full((batch, groups, num_blocks, topk), -1, dtype=torch.int64)
    for b in range(batch):
        for g in range(groups):
            q_rSD = q[b, g * rep : (g + 1) * rep].double()
            k_SD = k[b, g].double()
            keys = [
                [k_SD[t : t + part].mean(0).float() for t in range(j * region_size, (j + 1) * region_size, part)]
                for j in range(num_regions)
            ]
            for i in range(num_blocks):
                first = i * query_block_size
                queries = q_rSD[:, first] if causal else q_rSD[:, first : first + query_block_size].mean(1)
                query = queries.mean(0).float().double()
                own = first // region_size
                forced = {own} if rule.force_own else set()
                if rule.force_previous and own > 0:
                    forced.add(own - 1)
                if rule.attention_sink:
                    forced.add(0)
                candidates = [j for j in range(own if causal else num_regions) if j not in forced]
                affinity = {
                    j: max(float((query * key.double()).sum().float()) for key in keys[j]) for j in candidates
                }
                candidates.sort(key=lambda j: (-affinity[j], j))
                chosen = sorted(forced | set(candidates[: max(0, topk - len(forced))]))
                route[b, g, i, : len(chosen)] = torch.tensor(chosen, dtype=torch.int64)
    return route


def smear_keys(k: Tensor, smear_weight: Tensor) -> Tensor:
    """Add to each key a fraction of the key before it, token by token; differentiable.

    Args:
        k: [B, G, S, D].
        smear_weight: [G, D].

    Returns:
        k_t + smear_weight * k_(t-1), fp64 [B, G, S, D].
    """
    k, smear_weight = k.double(), smear_weight.double()
    tokens = [k[:, :, 0]]
    for t in range(1, k.shape[2]):
        tokens.append(k[:, :, t] + smear_weight * k[:, :, t - 1])
    return torch.stack(tokens, 2)


def visibility(route: Tensor, *, num_tokens: int, region_size: int, query_block_size: int, causal: bool) -> Tensor:
    """Compute which key tokens each query token may see.

    Args:
        route: [B, G, N, K].
        num_tokens: S.
        region_size: L.
        query_block_size: Lq.
        causal: whether later tokens are masked.

    Returns:
        bool [B, G, S, S], queries by keys.
    """
    batch, groups, num_blocks, _ = route.shape
    visible = torch.zeros(batch, groups, num_tokens, num_tokens, dtype=torch.bool)
    for b in range(batch):
        for g in range(groups):
            for i in range(num_blocks):
                queries = slice(i * query_block_size, (i + 1) * query_block_size)
                for j in route[b, g, i].tolist():
                    if j >= 0:
                        visible[b, g, queries, j * region_size : (j + 1) * region_size] = True
    if causal:
        visible &= torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    return visible


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
) -> Tensor:
    """Attend every query block to the regions of its route; differentiable.

    Args:
        q: [B, H, S, D].
        k: [B, G, S, D].
        v: [B, G, S, D].
        route: [B, G, S // Lq, K].
        region_size: L.
        query_block_size: Lq.
        causal: whether later tokens are masked.
        scale: of the scores; left out: 1 / sqrt(D).

    Returns:
        fp64 [B, H, S, D]; 0 for a query that sees no key.
    """
    num_heads, num_tokens, head_size = q.shape[1:]
    rep = num_heads // k.shape[1]
    scale = head_size**-0.5 if scale is None else scale
    visible_BGSS = visibility(
        route, num_tokens=num_tokens, region_size=region_size, query_block_size=query_block_size, causal=causal
    )
    visible_BHSS = visible_BGSS.repeat_interleave(rep, dim=1)
    k_BHSD = k.double().repeat_interleave(rep, dim=1)
    v_BHSD = v.double().repeat_interleave(rep, dim=1)
    score_BHSS = q.double() @ k_BHSD.transpose(2, 3) * scale
    # A finite value instead of -inf keeps the gradient of a query without keys at 0 instead of NaN.
    weight_BHSS = score_BHSS.masked_fill(~visible_BHSS, -1e300).softmax(-1).masked_fill(~visible_BHSS, 0.0)
    return weight_BHSS @ v_BHSD
