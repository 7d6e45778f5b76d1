"""Time of a microbatch's attention and routing on a CPU, from the rates that were measured apart. No torch.

Attention over routes computes more than the pairs of its routes: whole tiles, or all pairs under a mask. What it
computes follows from sizes (`model/attention/paths.py`); how long a pair takes is measured at other sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

from biroute.launcher.plan.hardware import AttentionRate, CpuRates, HardwareProfile
from biroute.launcher.plan.workload import Workload
from biroute.model.attention.paths import ComputedPairs, masked_pairs, prefers_mask, tiled_pairs

FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5  # backward computes the scores again
FORWARD_COPIES, BACKWARD_COPIES = 2, 4  # of gathered rows: keys and values, or queries and outputs
# Query rows that PyTorch's attention on CPUs takes at once, by the queries' number: the keys of all of them up to the
# last one's own are computed (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp).
QUERY_ROWS = ((768, 256), (192, 64), (0, 32))


@dataclass(frozen=True)
class AttentionTime:
    """Seconds of one layer's attention for a microbatch on one rank, and of choosing its routes."""

    forward: float
    backward: float
    routing: float


def attention_time(work: Workload, cpu: CpuRates, layer: int) -> AttentionTime:
    """Return the times of a layer, on the region rank that computes most."""
    model = work.config.model
    heads = work.sequences * model.num_heads / work.layout.tensor
    rate, computed = computed_pairs(work, cpu, layer)
    gathered = computed.gathered * model.head_size * 4.0 / (1e9 * cpu.gather_gb_per_second)

    def seconds(pair_ns: float, gflops: float, products: int, copies: int) -> float:
        pair = 1e-9 * (pair_ns + 2 * products * model.head_size / gflops)
        return heads * (computed.pairs * pair + copies * gathered)

    return AttentionTime(
        seconds(rate.forward_pair_ns, rate.forward_gflops, FORWARD_PRODUCTS, FORWARD_COPIES),
        seconds(rate.backward_pair_ns, rate.backward_gflops, BACKWARD_PRODUCTS, BACKWARD_COPIES),
        _routing(work, cpu, layer),
    )


def busy_factor(hardware: HardwareProfile, ranks: int) -> float:
    """Return how many times as long a rank computes while all of so many ranks do.

    Cores share units, caches and memory. What all ranks of a node lose together was measured; fewer lose less, in
    proportion.
    """
    others = min(ranks, hardware.devices_per_node) - 1
    if hardware.cpu is None or others < 1:
        return 1.0
    return 1 + (hardware.cpu.all_ranks_factor - 1) * others / (hardware.devices_per_node - 1)


def computed_pairs(work: Workload, cpu: CpuRates, layer: int) -> tuple[AttentionRate, ComputedPairs]:
    """Return the path that a layer takes, and what it computes for one query head of one sequence on a rank."""
    model, ranks = work.config.model, work.layout.region
    attention, tokens, kind = model.attention, model.sequence_length, model.attention_kind(layer)
    if kind == "dense":
        return cpu.dense, ComputedPairs(dense_pairs(tokens, ranks, model.causal), 0.0)
    size, regions = attention.region_size, model.num_regions
    block = size if kind == "sliding_window" else attention.query_block_size
    rep, topk = model.num_heads // model.num_kv_heads, min(attention.topk, regions)
    if ranks == 1 and prefers_mask(tokens, size, rep * block, attention.topk):
        return cpu.masked, masked_pairs(tokens, size, model.causal)
    last = (regions - regions // ranks, regions)  # the last rank's regions have the longest routes
    return cpu.tiles, tiled_pairs(
        regions=last, region_size=size, query_block_size=block, heads=rep, topk=topk, causal=model.causal
    )


def dense_pairs(tokens: int, ranks: int, causal: bool) -> float:
    """Return the pairs that PyTorch's attention computes for the last of `ranks` equal parts of a sequence."""
    queries = tokens // ranks
    if not causal:
        return float(queries) * tokens
    at_once = next(rows for least, rows in QUERY_ROWS if queries >= least)
    return queries * (tokens - queries) + queries * (queries + min(at_once, queries)) / 2


def _routing(work: Workload, cpu: CpuRates, layer: int) -> float:
    model = work.config.model
    attention = model.attention
    if model.attention_kind(layer) != "bi_level":
        return 0.0
    groups = work.sequences * model.num_kv_heads / work.layout.tensor
    choices = groups * work.tokens / work.sequences / attention.query_block_size * model.num_regions
    products = 0 if attention.router == "random" else 2 * attention.descriptors_per_region * model.head_size
    return choices * 1e-9 * (cpu.choice_ns + products / cpu.routing_gflops)
