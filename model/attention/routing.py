"""Level one: which regions each query block attends to.

A route is int64 [B, G, N, K]: the chosen regions of each query block in ascending order, then -1 for empty slots. So
the last valid entry of a causal route is the own region, and the previous region, if routed, comes before it.

Shapes: B sequences, H query heads, G key/value heads, r query heads of a key/value head, S tokens, D head size, L
tokens of a region, R regions, n descriptors of a region, Lq (suffix M) tokens of a query block, N query blocks (of
the sequence, or of one chunk), K slots of a route.
"""

from __future__ import annotations

import torch
from torch import Tensor

from biroute.model.attention.grid import KERNEL_DEVICES
from biroute.model.attention.rule import MOST_REGIONS_OF_KERNEL, RouteRule

# Bounds of the number of affinities in one chunk: the working memory is a fraction of the queries' memory.
CHUNK_AFFINITIES = (1 << 14, 1 << 19)
# Descriptors of a diverged model are clamped to this, so that affinities stay finite and every route stays valid.
LARGEST_DESCRIPTOR = 1e15
MASK32 = 0xFFFFFFFF


def key_descriptors(k: Tensor, region_size: int, descriptors_per_region: int = 1) -> Tensor:
    """Compute the mean key of each region, or of each of the n equal parts of a region.

    Args:
        k: [B, G, S, D].
        region_size: L.
        descriptors_per_region: n.

    Returns:
        fp32 [B, G, R * n, D], region by region.

    Raises:
        ValueError: region_size does not divide S, or n does not divide region_size.

    Source: region-level keys of BiFormer (CVPR 2023, arXiv:2303.08810); block means of MoBA (arXiv:2502.13189).
    """
    num_tokens = k.shape[2]
    if num_tokens % region_size:
        raise ValueError(f"region_size={region_size} does not divide the {num_tokens} tokens")
    if region_size % descriptors_per_region:
        raise ValueError(f"descriptors_per_region={descriptors_per_region} does not divide region_size={region_size}")
    part_size = region_size // descriptors_per_region
    if k.device.type in KERNEL_DEVICES:
        return _kernel_mean(k, k.shape[1], part_size, part_size)
    parts = k.detach().unflatten(2, (-1, part_size))
    if k.device.type != "cpu":
        return exact_mean(parts, (3,))
    # One sequence at a time, because on the CPU the mean makes a copy in fp64.
    return torch.stack([exact_mean(x, (2,)) for x in parts])


def query_descriptors(
    q: Tensor, groups: int, query_block_size: int, causal: bool, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Compute the query of each query block, averaged over the query heads of each key/value head.

    Args:
        q: [B, H, S, D].
        groups: G.
        query_block_size: Lq.
        causal: take the query of the block's first token, the only token that all tokens of the block may see;
            otherwise take the mean over the block, as in BiFormer.
        dtype: that the fp32 descriptors are rounded to.

    Returns:
        [B, G, N, D].

    Raises:
        ValueError: groups does not divide H, or query_block_size does not divide S.

    Source: BiFormer (CVPR 2023, arXiv:2303.08810).
    """
    num_heads, num_tokens = q.shape[1:3]
    if num_heads % groups:
        raise ValueError(f"{groups} key/value heads do not divide {num_heads} query heads")
    if num_tokens % query_block_size:
        raise ValueError(f"query_block_size={query_block_size} does not divide the {num_tokens} tokens")
    if q.device.type in KERNEL_DEVICES:
        return _kernel_mean(q, groups, 1 if causal else query_block_size, query_block_size, dtype)
    q_BGrNMD = q.detach().unflatten(1, (groups, -1)).unflatten(3, (-1, query_block_size))
    if causal:
        return exact_mean(q_BGrNMD[:, :, :, :, 0], (2,)).to(dtype)
    return exact_mean(q_BGrNMD, (2, 4)).to(dtype)


def _kernel_mean(x: Tensor, groups: int, tokens: int, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    from biroute.model.attention.block_sparse.descriptors import mean_descriptors

    return mean_descriptors(x.detach(), groups, tokens, step, largest=LARGEST_DESCRIPTOR, dtype=dtype)


def exact_mean(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return the mean over some dimensions as descriptors are defined: in fp32, finite."""
    # Summed in fp64 and rounded once: every memory layout gives the same bits, so a rank that holds a part of the
    # sequence chooses the same regions as one process that holds all of it.
    mean = x.mean(dims, dtype=torch.float64).float()
    return mean.nan_to_num_(0.0).clamp_(-LARGEST_DESCRIPTOR, LARGEST_DESCRIPTOR)


@torch.no_grad()
def route_regions(q: Tensor, k: Tensor, rule: RouteRule) -> Tensor:
    """Choose the regions of every query block of whole sequences; the choice carries no gradient.

    Args:
        q: [B, H, S, D].
        k: [B, G, S, D].
        rule: how regions are chosen.

    Returns:
        The route, int64 [B, G, S // Lq, K], ascending, -1 = empty.

    Raises:
        ValueError: sizes do not fit together.

    Source: BiFormer (CVPR 2023, arXiv:2303.08810) for blocks, MoBA (arXiv:2502.13189) for single tokens.
    """
    return route_query_blocks(q, key_descriptors(k, rule.region_size, rule.descriptors_per_region), rule)


@torch.no_grad()
def route_query_blocks(
    q: Tensor, descriptors: Tensor, rule: RouteRule, *, first_token: int = 0, first_kv_head: int = 0
) -> Tensor:
    """Choose the regions of the query blocks of consecutive tokens, given the descriptors of all regions.

    Args:
        q: [B, H, S, D] the tokens from `first_token` on.
        descriptors: fp32 [B, G, R * n, D] `key_descriptors` of the whole sequence; the affinity of a region is the
            largest of its n descriptors.
        rule: how regions are chosen.
        first_token: the position of the first token in the sequence.
        first_kv_head: the number of the first key/value head here among those of all tensor ranks; used by the random
            router only.

    Returns:
        The route, int64 [B, G, S // Lq, K], the same bits as those rows of the route of the whole sequence.

    Raises:
        ValueError: the tokens are not whole query blocks.
    """
    lq = rule.query_block_size
    if first_token % lq or q.shape[2] % lq:
        raise ValueError(f"first_token={first_token} and {q.shape[2]} tokens are not whole query blocks of {lq}")
    batch, groups, num_descriptors, _ = descriptors.shape
    per_region = rule.descriptors_per_region
    num_regions = num_descriptors // per_region
    num_blocks = q.shape[2] // lq
    if q.device.type in KERNEL_DEVICES and rule.router == "affinity" and num_regions <= MOST_REGIONS_OF_KERNEL:
        from biroute.model.attention.block_sparse.router import fused_route

        dtype = q.dtype if q.dtype in (torch.float16, torch.bfloat16) else torch.float32
        queries = query_descriptors(q, groups, lq, rule.causal, dtype=dtype)
        return fused_route(queries, descriptors, rule, first_token=first_token, dtype=dtype)
    keys_nBGRD = descriptors.double().unflatten(2, (num_regions, per_region)).permute(3, 0, 1, 2, 4)
    affinities = min(max(q.numel() // 16, CHUNK_AFFINITIES[0]), CHUNK_AFFINITIES[1])
    chunk = max(1, affinities // (batch * groups * num_regions))
    route_BGNK = q.new_full((batch, groups, num_blocks, rule.topk), -1, dtype=torch.int64)
    for start in range(0, num_blocks, chunk):
        queries_BGND = query_descriptors(q[:, :, start * lq : (start + chunk) * lq], groups, lq, rule.causal)
        route_BGNK[:, :, start : start + chunk] = choose_regions(
            queries_BGND, keys_nBGRD, rule, first_block=first_token // lq + start, first_kv_head=first_kv_head
        )
    return route_BGNK


def choose_regions(
    queries_BGND: Tensor, keys_nBGRD: Tensor, rule: RouteRule, *, first_block: int, first_kv_head: int = 0
) -> Tensor:
    """Choose the regions of consecutive query blocks from the descriptors of both sides.

    A block gets the same route alone and among others.

    Args:
        queries_BGND: fp32 [B, G, N, D], as from `query_descriptors`.
        keys_nBGRD: fp64 [n, B, G, R, D], the descriptors of `key_descriptors` by their place in the region. Causal:
            those of a block's own region and of later ones may hold anything finite.
        rule: how regions are chosen.
        first_block: the number of the first block in the sequence.
        first_kv_head: as in `route_query_blocks`.

    Returns:
        The route, int64 [B, G, N, K], ascending, -1 = empty.
    """
    batch, groups, num_blocks, _ = queries_BGND.shape
    block_N = torch.arange(num_blocks, device=queries_BGND.device) + first_block
    own_N = block_N * rule.query_block_size // rule.region_size
    # Causal: no block may choose a region after the own region of the last block.
    last_own = (first_block + num_blocks - 1) * rule.query_block_size // rule.region_size
    columns = last_own + 1 if rule.causal else keys_nBGRD.shape[3]
    if rule.router == "random":
        group_G = torch.arange(first_kv_head, first_kv_head + groups, device=queries_BGND.device)
        region_R = torch.arange(columns, device=queries_BGND.device)
        affinity = random_affinity(rule.seed, group_G[:, None, None], block_N[:, None], region_R)
        affinity_BGNR = affinity.expand(batch, -1, -1, -1)
    else:
        affinity_BGNR = _affinities(queries_BGND, keys_nBGRD[:, :, :, :columns].transpose(3, 4))
    return select_regions(affinity_BGNR, own_N, rule)


def _affinities(queries_BGND: Tensor, keys_nBGDR: Tensor) -> Tensor:
    """Return fp32 [B, G, N, R]: the largest product of a query with any of a region's n descriptors."""
    # Products in fp64, rounded to fp32, are the same for every chunk shape (see `exact_mean`). One descriptor of
    # every region is taken at a time, because a maximum over many short rows takes longer than the products.
    queries_BGND = queries_BGND.double()
    best_BGNR = queries_BGND @ keys_nBGDR[0]
    for keys_BGDR in keys_nBGDR[1:]:
        torch.maximum(best_BGNR, queries_BGND @ keys_BGDR, out=best_BGNR)
    return best_BGNR.float()


def select_regions(affinity_BGNR: Tensor, own_N: Tensor, rule: RouteRule) -> Tensor:
    """Choose the forced regions and the best candidates; of equal affinities, the lower region wins.

    Args:
        affinity_BGNR: fp32 [B, G, N, R], finite; R may leave out the last regions of the sequence.
        own_N: int64 [N] the region that each query block lies in.
        rule: how regions are chosen.

    Returns:
        The route, int64 [B, G, N, K], ascending, -1 = empty.
    """
    num_regions = affinity_BGNR.shape[-1]
    region_R = torch.arange(num_regions, device=own_N.device)
    distance_NR = own_N[:, None] - region_R
    bias_NR = torch.zeros_like(distance_NR, dtype=affinity_BGNR.dtype)
    if rule.causal:
        bias_NR.masked_fill_(distance_NR <= 0, -torch.inf)
    if rule.force_own:
        bias_NR.masked_fill_(distance_NR == 0, torch.inf)
    if rule.force_previous:
        bias_NR.masked_fill_(distance_NR == 1, torch.inf)
    if rule.attention_sink:
        bias_NR[:, 0] = torch.inf
    slots = min(rule.topk, num_regions)
    route_BGNK = top_regions(affinity_BGNR + bias_NR, slots)
    padding = rule.topk - slots
    return torch.nn.functional.pad(route_BGNK, (0, padding), value=-1) if padding else route_BGNK


def top_regions(score_BGNR: Tensor, slots: int) -> Tensor:
    """Return the best `slots` regions with a score above -inf, ascending; the lower region wins a tie."""
    num_regions = score_BGNR.shape[-1]
    value, route = score_BGNR.topk(min(slots + 1, num_regions), sorted=True)
    if slots < num_regions:
        # topk breaks ties arbitrarily, which matters only between the last region chosen and the first one left out.
        last_chosen, first_left_out = value[..., slots - 1], value[..., slots]
        tied = (last_chosen == first_left_out) & (last_chosen > -torch.inf)
        if tied.any():
            order = score_BGNR[tied].sort(dim=-1, descending=True, stable=True)
            value[tied], route[tied] = order.values[:, : slots + 1], order.indices[:, : slots + 1]
        value, route = value[..., :slots], route[..., :slots]
    route = route.masked_fill(value == -torch.inf, num_regions).sort(dim=-1).values
    return route.masked_fill_(route == num_regions, -1)


def random_affinity(seed: int, group: Tensor, block: Tensor, region: Tensor) -> Tensor:
    """Compute uniform fp32 scores in [0, 1) from a hash of the arguments, which are broadcast.

    Unlike a generator, it gives the same scores in a part of the sequence, in a recomputation and in any order.

    Args:
        seed: any integer; its lowest 32 bits count.
        group: int64, the number of the key/value head.
        block: int64, the number of the query block.
        region: int64, the number of the region.

    Returns:
        fp32, of the shape that the tensors broadcast to.
    """
    mixed = _scramble(torch.full_like(group, seed & MASK32))
    for counter in (group, block, region):
        mixed = _scramble(mixed ^ (counter + 0x9E3779B9))
    return (mixed >> 8).float() * 2.0**-24


def _scramble(x: Tensor) -> Tensor:
    # A bijection on 32 bits: xor-shifts and odd multipliers; each product stays below 2^63.
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
    """Return the route of `kind: sliding_window`: a window of K regions.

    Causal: the own region and the K - 1 before it. Bidirectional: a window around the own region (with one more
    region before than after it if K is even), moved inwards at the ends of the sequence so that it keeps K regions.

    Args:
        batch: B.
        kv_heads: G.
        num_tokens: tokens to route, from `first_token` on.
        region_size: L.
        query_block_size: Lq.
        topk: K.
        causal: which window.
        first_token: the position of the first token in the sequence.
        sequence_length: tokens of the sequence; left out: num_tokens.
        device: of the result.

    Returns:
        int64 [B, G, num_tokens // Lq, K], ascending, -1 = empty.

    Raises:
        ValueError: sizes do not fit together.
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
    route_NK = start_N[:, None] + torch.arange(topk, device=device)
    route_NK = route_NK.masked_fill(route_NK > last_N[:, None], -1)
    return route_NK.expand(batch, kv_heads, -1, -1)
