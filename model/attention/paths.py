"""Which path attention takes on a CPU, and how many pairs it computes: from sizes alone, also for plans. No torch."""

from __future__ import annotations

from dataclasses import dataclass

# Sequences up to the first length are always masked, those above the second never.
MASKED_TOKENS, LARGEST_MASKED_TOKENS = 512, 4096
# Where few rows share a route: up to this many tokens of the sequence for each of the route's K slots, gathering
# takes longer than dense attention.
GATHERED_TOKENS = 100
CHUNK_TOKENS = 128  # query tokens of a chunk: enough for the product's full speed, few enough for a small mask
# Query rows of a region-major tile: enough for the products' full speed, few enough to waste little on padding.
ROWS_PER_TILE = 128


def prefers_mask(num_tokens: int, region_size: int, rows: int, topk: int) -> bool:
    """Decide whether masking is faster than gathering: the rule of `path="auto"` on the CPU.

    It is for short sequences; for routes that cover half of the sequence; and for routes that few rows share and that
    have many regions, because each of these is gathered separately.

    Args:
        num_tokens: S.
        region_size: L.
        rows: query rows that share a route (r heads of Lq tokens).
        topk: K.
    """
    if num_tokens <= MASKED_TOKENS:
        return True
    wide = num_tokens <= 2 * topk * region_size
    scattered = rows < region_size and num_tokens <= GATHERED_TOKENS * topk
    return (wide or scattered) and num_tokens <= LARGEST_MASKED_TOKENS


@dataclass(frozen=True)
class ComputedPairs:
    """What attention over routes computes for one query head of one sequence, masked and padded entries included."""

    pairs: float  # (query, key)
    gathered: float  # rows of queries or keys that are copied into tiles, for each product that reads or gives them


def masked_pairs(num_tokens: int, region_size: int, causal: bool) -> ComputedPairs:
    """Return what the masked path computes: all keys up to the end of each chunk of queries."""
    chunk = region_size * -(-CHUNK_TOKENS // region_size)
    return ComputedPairs(num_tokens * (num_tokens + min(chunk, num_tokens)) / 2 if causal else num_tokens**2, 0.0)


def tiled_pairs(
    *, regions: tuple[int, int], region_size: int, query_block_size: int, heads: int, topk: int, causal: bool
) -> ComputedPairs:
    """Return what the band and the tiles compute for the queries of the regions from `regions[0]` to `regions[1]`.

    It supposes that a block with all its regions fits into the buffers (`partial.use_region_major`).

    Args:
        regions: the first region, and the one after the last.
        region_size: L.
        query_block_size: Lq.
        heads: r, query heads of a key/value head.
        topk: K, at most the number of regions.
        causal: whether a region sees only those before it.
    """
    first, last = regions
    blocks, rows = region_size // query_block_size, query_block_size * heads
    routed = [min(region + 1, topk) if causal else topk for region in range(first, last)]
    in_band = [min(2, count) for count in routed]
    visits = float(blocks * (sum(routed) - sum(in_band)))
    if rows < region_size:
        # A tile is one region and several of its visitors; the last one of each region is half full on average.
        visits += (last - first) * max(1, ROWS_PER_TILE // rows) / 2 * (visits > 0)
        gathered = visits * query_block_size
    else:
        gathered = visits * region_size / heads  # the heads share the keys
    pairs = region_size**2 * sum(in_band) + visits * query_block_size * region_size
    return ComputedPairs(pairs, gathered)
