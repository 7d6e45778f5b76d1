"""Level one: which regions each query block attends to.

An index is int64 [B, G, Nq, topk]: the chosen regions of a query block in ascending order, then -1 for empty slots.
So the last valid entry of a causal index is the own region, and the previous one, where it is routed, stands before.

Legend: B batch, H query heads, G key/value heads, S tokens, D head size, L region size, R regions, Lq query block
size, E descriptors (n of each region), Nq query blocks, C query blocks of one chunk, T topk slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from biroute.model.attention.rule import MOST_REGIONS_OF_KERNEL, Router, RouteRule

# Bounds of the affinities computed at once: working memory is a fraction of the queries', whatever their number.
CHUNK_AFFINITIES = (1 << 14, 1 << 19)
# Descriptors of a diverged model are clamped to this, so that affinities stay finite and every route stays legal.
LARGEST_DESCRIPTOR = 1e15
MASK32 = 0xFFFFFFFF


def key_descriptors(k: Tensor, region_size: int, descriptors_per_region: int = 1) -> Tensor:
    """Mean key of each region, or of each of its n = `descriptors_per_region` equal parts.

    k [B, G, S, D] -> fp32 [B, G, R * n, D], region by region. Raises ValueError unless region_size divides S and n
    region_size.
    Source: region-level keys of BiFormer (CVPR 2023, arXiv:2303.08810); block means of MoBA (arXiv:2502.13189).
    """
    num_tokens = k.shape[2]
    if num_tokens % region_size:
        raise ValueError(f"region_size={region_size} does not divide the {num_tokens} tokens")
    if region_size % descriptors_per_region:
        raise ValueError(f"descriptors_per_region={descriptors_per_region} does not divide region_size={region_size}")
    part_size = region_size // descriptors_per_region
    # One sequence at a time: the mean works on an fp64 copy.
    return torch.stack([_exact_mean(k_GrlD, (2,)) for k_GrlD in k.detach().unflatten(2, (-1, part_size))])


def query_descriptors(q: Tensor, groups: int, query_block_size: int, causal: bool) -> Tensor:
    """Mean over the heads of a group of what a query block asks for.

    q [B, H, S, D] -> fp32 [B, G, Nq, D]. Causal: the block's first token, the only one that all its tokens may
    depend on. Bidirectional: the mean over the block, as in BiFormer (CVPR 2023, arXiv:2303.08810).
    Raises ValueError unless groups divides H and query_block_size divides S.
    """
    num_heads, num_tokens = q.shape[1:3]
    if num_heads % groups:
        raise ValueError(f"{groups} key/value heads do not divide {num_heads} query heads")
    if num_tokens % query_block_size:
        raise ValueError(f"query_block_size={query_block_size} does not divide the {num_tokens} tokens")
    q_BGrNLD = q.detach().unflatten(1, (groups, -1)).unflatten(3, (-1, query_block_size))
    if causal:
        return _exact_mean(q_BGrNLD[:, :, :, :, 0], (2,))
    return _exact_mean(q_BGrNLD, (2, 4))


def _exact_mean(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    # Summed in fp64 and rounded once: the same bits for every memory layout, so that a shard chooses like the whole.
    mean = x.mean(dims, dtype=torch.float64).float()
    return mean.nan_to_num_(0.0).clamp_(-LARGEST_DESCRIPTOR, LARGEST_DESCRIPTOR)


@torch.no_grad()
def route_regions(
    q: Tensor,
    k: Tensor,
    *,
    region_size: int,
    query_block_size: int,
    topk: int,
    causal: bool,
    force_own: bool = True,
    force_previous: bool = True,
    attention_sink: bool = False,
    router: Router = "affinity",
    seed: int = 0,
    descriptors_per_region: int = 1,
) -> Tensor:
    """Route every query block of whole sequences; the choice carries no gradient.

    q [B, H, S, D], k [B, G, S, D] -> index int64 [B, G, S // Lq, topk], ascending, -1 = empty.
    Raises ValueError for sizes that do not fit together.
    Source: BiFormer (CVPR 2023, arXiv:2303.08810) for blocks, MoBA (arXiv:2502.13189) for single tokens.
    """
    rule = RouteRule(
        region_size, query_block_size, topk, causal, force_own, force_previous, attention_sink, router, seed,
        descriptors_per_region,
    )  # fmt: skip
    return route_query_blocks(q, key_descriptors(k, region_size, descriptors_per_region), rule)


@torch.no_grad()
def route_query_blocks(
    q: Tensor, key_descriptors_BGED: Tensor, rule: RouteRule, *, first_token: int = 0, first_kv_head: int = 0
) -> Tensor:
    """Route the query blocks of a run of tokens against the descriptors of all regions.

    q [B, H, S', D] are the tokens from `first_token` on, key_descriptors_BGED [B, G, R * n, D] those of the whole
    sequence, n for each region: the affinity of a region is that of its nearest descriptor.
    -> index int64 [B, G, S' // Lq, topk], the same bits as the rows of a whole run. `first_kv_head` is the number of
    the first key/value head here (only the random router asks). Raises ValueError for a start inside a block.
    """
    lq = rule.query_block_size
    if first_token % lq or q.shape[2] % lq:
        raise ValueError(f"first_token={first_token} and {q.shape[2]} tokens are not whole query blocks of {lq}")
    batch, groups, num_descriptors, _ = key_descriptors_BGED.shape
    per_region = rule.descriptors_per_region
    num_regions = num_descriptors // per_region
    num_blocks = q.shape[2] // lq
    if q.device.type == "cuda" and rule.router == "affinity" and num_regions <= MOST_REGIONS_OF_KERNEL:
        from biroute.model.attention.block_sparse.router import fused_route

        dtype = q.dtype if q.dtype in (torch.float16, torch.bfloat16) else torch.float32
        queries = query_descriptors(q, groups, lq, rule.causal)
        return fused_route(queries, key_descriptors_BGED, rule, first_token=first_token, dtype=dtype)
    keys_nBGDR = key_descriptors_BGED.double().unflatten(2, (num_regions, per_region)).permute(3, 0, 1, 4, 2)
    affinities = min(max(q.numel() // 16, CHUNK_AFFINITIES[0]), CHUNK_AFFINITIES[1])
    chunk = max(1, affinities // (batch * groups * num_regions))
    index_BGNT = q.new_full((batch, groups, num_blocks, rule.topk), -1, dtype=torch.int64)
    for start in range(0, num_blocks, chunk):
        queries_BGCD = query_descriptors(q[:, :, start * lq : (start + chunk) * lq], groups, lq, rule.causal)
        block_C = torch.arange(queries_BGCD.shape[2], device=q.device) + (first_token // lq + start)
        own_C = block_C * lq // rule.region_size
        # Causal: regions after the chunk's last own one are no candidates for any of its blocks.
        columns = int(own_C[-1]) + 1 if rule.causal else num_regions
        if rule.router == "random":
            group_G = torch.arange(first_kv_head, first_kv_head + groups, device=q.device)
            region_R = torch.arange(columns, device=q.device)
            affinity = random_affinity(rule.seed, group_G[:, None, None], block_C[:, None], region_R)
            affinity_BGCR = affinity.expand(batch, -1, -1, -1)
        else:
            affinity_BGCR = _affinities(queries_BGCD, keys_nBGDR[..., :columns])
        index_BGNT[:, :, start : start + chunk] = select_regions(affinity_BGCR, own_C, rule)
    return index_BGNT


def _affinities(queries_BGCD: Tensor, keys_nBGDR: Tensor) -> Tensor:
    """fp32 [B, G, C, R]: the largest product with any of a region's n descriptors."""
    # fp64 products rounded to fp32: equal affinities for every chunk shape (see _exact_mean). One descriptor of every
    # region at a time: a maximum over many short rows takes longer than the products.
    queries_BGCD = queries_BGCD.double()
    best_BGCR = queries_BGCD @ keys_nBGDR[0]
    for keys_BGDR in keys_nBGDR[1:]:
        torch.maximum(best_BGCR, queries_BGCD @ keys_BGDR, out=best_BGCR)
    return best_BGCR.float()


def select_regions(affinity_BGCR: Tensor, own_C: Tensor, rule: RouteRule) -> Tensor:
    """The forced regions and the best candidates.

    affinity fp32 [B, G, C, R'] (finite, regions 0 ... R' - 1), own int64 [C] -> index int64 [B, G, C, topk],
    ascending, -1 = empty. Equal affinities: the lower region wins.
    """
    num_regions = affinity_BGCR.shape[-1]
    region_R = torch.arange(num_regions, device=own_C.device)
    distance_CR = own_C[:, None] - region_R
    bias_CR = torch.zeros_like(distance_CR, dtype=affinity_BGCR.dtype)
    if rule.causal:
        bias_CR.masked_fill_(distance_CR <= 0, -torch.inf)
    if rule.force_own:
        bias_CR.masked_fill_(distance_CR == 0, torch.inf)
    if rule.force_previous:
        bias_CR.masked_fill_(distance_CR == 1, torch.inf)
    if rule.attention_sink:
        bias_CR[:, 0] = torch.inf
    slots = min(rule.topk, num_regions)
    index_BGCT = _top_regions(affinity_BGCR + bias_CR, slots)
    padding = rule.topk - slots
    return torch.nn.functional.pad(index_BGCT, (0, padding), value=-1) if padding else index_BGCT


def _top_regions(score_BGCR: Tensor, slots: int) -> Tensor:
    """The best `slots` regions with a score above -inf, ascending; the lower region wins a tie."""
    num_regions = score_BGCR.shape[-1]
    value, index = score_BGCR.topk(min(slots + 1, num_regions), sorted=True)
    if slots < num_regions:
        # topk breaks ties as it likes, which matters only between the last one in and the first one out.
        last_in, first_out = value[..., slots - 1], value[..., slots]
        tied = (last_in == first_out) & (last_in > -torch.inf)
        if tied.any():
            order = score_BGCR[tied].sort(dim=-1, descending=True, stable=True)
            value[tied], index[tied] = order.values[:, : slots + 1], order.indices[:, : slots + 1]
        value, index = value[..., :slots], index[..., :slots]
    index = index.masked_fill(value == -torch.inf, num_regions).sort(dim=-1).values
    return index.masked_fill_(index == num_regions, -1)


def random_affinity(seed: int, group: Tensor, block: Tensor, region: Tensor) -> Tensor:
    """Uniform fp32 scores in [0, 1) from a hash of (seed, group, query block, region): int64 tensors that broadcast.

    A counter instead of a generator: the same scores in a shard, in a recomputation and in another order.
    """
    mixed = _scramble(torch.full_like(group, seed & MASK32))
    for counter in (group, block, region):
        mixed = _scramble(mixed ^ (counter + 0x9E3779B9))
    return (mixed >> 8).float() * 2.0**-24


def _scramble(x: Tensor) -> Tensor:
    # A bijection on 32 bits: xor-shifts and odd multipliers, each product kept below 2^63.
    x = x & MASK32
    for shift, multiplier in ((16, 0x45D9F3B), (15, 0x2C1B3C6D)):
        x = ((x ^ (x >> shift)) * multiplier) & MASK32
    return x ^ (x >> 16)


@torch.no_grad()
def sliding_window_route(
    *,
    batch: int,
    kv_heads: int,
    num_tokens: int,
    region_size: int,
    query_block_size: int,
    topk: int,
    causal: bool,
    first_token: int = 0,
    sequence_length: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The route of `kind: sliding_window`: a window of topk regions.

    Causal: the own region and the topk - 1 before it. Bidirectional: a window around the own region (one more before
    than after if topk is even), moved inwards at the ends so that it keeps topk regions.
    -> index int64 [B, G, num_tokens // Lq, topk], ascending, -1 = empty, for the tokens from `first_token` on of a
    sequence of `sequence_length` (left out: of num_tokens). Raises ValueError for sizes that do not fit together.
    """
    RouteRule(region_size, query_block_size, topk, causal, force_previous=False)
    total = num_tokens if sequence_length is None else sequence_length
    if num_tokens % query_block_size or total % region_size or first_token % query_block_size:
        raise ValueError(
            f"num_tokens={num_tokens}, first_token={first_token} (query_block_size={query_block_size}) or "
            f"sequence_length={total} (region_size={region_size}) is not a whole number of blocks"
        )
    num_regions = total // region_size
    block_N = torch.arange(num_tokens // query_block_size, device=device) + first_token // query_block_size
    own_N = block_N * query_block_size // region_size
    if causal:
        start_N = (own_N - topk + 1).clamp(min=0)
        last_N = own_N
    else:
        start_N = (own_N - topk // 2).clamp(min=0, max=max(0, num_regions - topk))
        last_N = (start_N + topk - 1).clamp(max=num_regions - 1)
    index_NT = start_N[:, None] + torch.arange(topk, device=device)
    index_NT = index_NT.masked_fill(index_NT > last_N[:, None], -1)
    return index_NT.expand(batch, kv_heads, -1, -1)
