"""Bytes that a rank sends in an optimizer step, by axis: what the code's collectives move, from sizes. No torch.

A collective over n ranks counts as the ring algorithms move it: an all-reduce of b bytes sends 2 (n - 1) / n b from
each rank, a gather of b bytes in all, or a reduce-scatter of b bytes, (n - 1) / n b.

Source: Patarasuk and Yuan 2009, Bandwidth optimal all-reduce algorithms for clusters of workstations;
Korthikanti et al. 2022 (arXiv:2205.05198), section 4.2.2, for what sequence parallelism sends;
Rajbhandari et al. 2020 (arXiv:1910.02054), section 7, for ZeRO.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from biroute.launcher.plan.workload import Workload
from biroute.parallel.region.costs import Baselines, ExchangeCosts, RegionLayout

Axis = Literal["tensor", "region", "pipeline", "data"]
AXES: tuple[Axis, ...] = ("tensor", "region", "pipeline", "data")
Operation = Literal["all_reduce", "gather", "reduce_scatter", "send", "all_to_all"]
# Of the bound, in forward: what routes of trained runs moved at 2 to 64 ranks, docs/benchmarks/exchange.md.
ASSUMED_EXCHANGE = 0.4
PERSISTENT_ELEMENTS = 100_000  # DeepSpeed's stage3_param_persistence_threshold
REUSE_DISTANCE = 1_000_000_000  # DeepSpeed's stage3_max_reuse_distance


@dataclass(frozen=True)
class Traffic:
    """One kind of communication of a rank in a step."""

    axis: Axis
    what: str
    operation: Operation
    tensor_bytes: float  # of one call; of an all-to-all, what a rank sends to all others together
    calls: float
    ranks: int

    @property
    def sent_bytes(self) -> float:
        """Bytes that a rank sends in a step."""
        share = (self.ranks - 1) / self.ranks
        factor = {"all_reduce": 2 * share, "gather": share, "reduce_scatter": share}.get(self.operation, 1.0)
        return factor * self.tensor_bytes * self.calls

    @property
    def messages(self) -> float:
        """Messages, one after the other, that a step waits for."""
        hops = {"all_reduce": 2 * (self.ranks - 1), "send": 1, "all_to_all": 1}.get(self.operation, self.ranks - 1)
        return hops * self.calls


@dataclass(frozen=True)
class RegionExchange:
    """What region ranks exchange: at most `bound`, and of what depends on routes a fraction.

    All are bytes that a rank receives in a step, forward and backward, mean over the region ranks.
    """

    bound: float
    certain: float  # the part of sliding windows, which depends on no route
    causal_fetch: float  # if keys and values of all earlier ranks travelled
    fraction: float  # of the bound of routed layers

    @property
    def expected(self) -> float:
        """Bytes in a step at the assumed fraction."""
        return self.certain + self.fraction * (self.bound - self.certain)


def traffic(work: Workload, stage: int, exchange_fraction: float = ASSUMED_EXCHANGE) -> list[Traffic]:
    """Return what a rank of a pipeline stage sends in a step, apart from scalars.

    Args:
        work: configuration, layout and execution.
        stage: the pipeline stage, from 0.
        exchange_fraction: of the bound, what routed layers exchange between region ranks.
    """
    found = [*_tensor(work, stage), *_pipeline(work, stage), *_data(work, stage)]
    if work.layout.region > 1:
        found += _region(work, stage, exchange_fraction)
    return [one for one in found if one.ranks > 1 and one.calls]


def bytes_by_axis(found: list[Traffic]) -> dict[Axis, float]:
    """Sum the bytes that a rank sends in a step, by axis."""
    return {axis: sum(one.sent_bytes for one in found if one.axis == axis) for axis in AXES}


def _tensor(work: Workload, stage: int) -> Iterator[Traffic]:
    """Megatron-core's collectives around column- and row-parallel matrices, the embedding and the head."""
    config, ranks = work.config, work.layout.tensor
    layers, batches = work.layers_of_stage[stage], work.microbatches
    hidden = work.tokens * config.model.hidden_size * work.element_size
    first, last = stage == 0, stage == work.layout.pipe - 1
    full = work.execution.recompute == "full"
    # The recomputed forward stops before the last sum of a block: nothing needs its result.
    if config.parallel.sequence_parallel:
        # Of two column-parallel matrices, forward and again backward; of two row-parallel ones, backward.
        gathers = batches * ((6 + 2 * full) * layers + first + last)
        scatters = batches * ((4 + full) * layers + first + last)
        yield Traffic("tensor", "hidden", "gather", hidden, gathers, ranks)
        yield Traffic("tensor", "hidden", "reduce_scatter", hidden, scatters, ranks)
        norm = float(work.element_size * config.model.hidden_size)
        yield Traffic("tensor", "norms' gradients", "all_reduce", norm, batches * (2 * layers + last), ranks)
    else:
        yield Traffic("tensor", "hidden", "all_reduce", hidden, batches * ((4 + full) * layers + first + last), ranks)
    if last:
        # The largest logit of each token, the sum of their exponentials, and the logit of the right word.
        yield Traffic("tensor", "sums of the loss", "all_reduce", 4.0 * work.tokens, 3 * batches, ranks)
    if config.model.qk_norm:
        head_norm = float(work.element_size * config.model.head_size)
        yield Traffic("tensor", "norms' gradients", "all_reduce", head_norm, batches * 2 * layers, ranks)


def _pipeline(work: Workload, stage: int) -> Iterator[Traffic]:
    """Activations to the next stage, gradients to the one before, and what both ends of a tied embedding agree on."""
    ranks, model = work.layout.pipe, work.config.model
    first, last = stage == 0, stage == ranks - 1
    hidden = work.tokens * model.hidden_size * work.element_size
    hidden /= work.layout.tensor if work.execution.scatters_sends else work.residual_ranks
    directions = (not first) + (not last)
    calls = work.microbatches * directions * work.execution.virtual_stages
    yield Traffic("pipeline", "hidden", "send", hidden, calls, ranks)
    if model.tied_embeddings and (first or last) and ranks > 1:
        share = work.embedding / work.layout.tensor
        yield Traffic("pipeline", "tied embedding's gradient", "all_reduce", 4.0 * share, 1, 2)
        if first:
            yield Traffic("pipeline", "tied embedding", "send", work.element_size * share, 1, 2)


def _data(work: Workload, stage: int) -> Iterator[Traffic]:
    """Gradients summed over data and region ranks, and weights gathered: DeepSpeed's ZeRO."""
    parameters, ranks = work.parameters_of_stage(stage), work.data_ranks
    execution, zero = work.execution, work.layout.zero_stage
    calls = work.microbatches if execution.reduces_each_microbatch else 1
    yield Traffic("data", "gradients", execution.reduction, execution.reduction_bytes * parameters, calls, ranks)
    if zero == 3:
        # Small weights are whole on every rank between two steps. Others are gathered for forward, and again for
        # backward if by then more than REUSE_DISTANCE elements were used.
        kept = sum(size * count for size, count in work.tensors_of_stage(stage).items() if size < PERSISTENT_ELEMENTS)
        times = work.microbatches * (2 if 2 * parameters > REUSE_DISTANCE else 1)
        yield Traffic("data", "small weights", "gather", work.element_size * kept, 1, ranks)
        yield Traffic("data", "weights", "gather", work.element_size * (parameters - kept), times, ranks)
    elif zero:
        yield Traffic("data", "weights", "gather", work.element_size * parameters, 1, ranks)


def _region(work: Workload, stage: int, fraction: float) -> Iterator[Traffic]:
    """What `parallel/region` sends for a layer: descriptors, neighbouring keys, requests, and the exchange itself."""
    model, ranks = work.config.model, work.layout.region
    groups = model.num_kv_heads / work.layout.tensor  # key/value heads of a tensor rank
    first_layer = sum(work.layers_of_stage[:stage])
    kinds = [model.attention_kind(first_layer + layer) for layer in range(work.layers_of_stage[stage])]
    forwards = work.microbatches * (2 if work.execution.recompute == "full" else 1)
    routed, dense = kinds.count("bi_level"), kinds.count("dense")
    heads = work.sequences * groups
    if model.attention.router == "affinity":
        descriptors = 4.0 * heads * model.num_regions * model.attention.descriptors_per_region * model.head_size
        yield Traffic("region", "descriptors", "gather", descriptors, forwards * routed, ranks)
    if model.key_smear:
        key = heads * model.head_size * work.element_size  # forward to the next rank, or its gradient back
        calls = (forwards + work.microbatches) * len(kinds) * (ranks - 1) / ranks
        yield Traffic("region", "neighbouring keys", "send", key, calls, ranks)
    tokens = 2 * heads * model.sequence_length * model.head_size  # keys and values
    gathered = work.element_size * tokens
    yield Traffic("region", "keys and values of dense layers", "gather", gathered, forwards * dense, ranks)
    yield Traffic("region", "their gradients", "reduce_scatter", 4.0 * tokens, work.microbatches * dense, ranks)
    header = 24.0 * heads * (ranks - 1)  # three int64 for each head and rank; the lists that follow are small
    yield Traffic("region", "requests", "all_to_all", header, forwards * (len(kinds) - dense), ranks)
    expected = region_exchange(work, stage, fraction).expected
    yield Traffic("region", "routed regions or queries", "all_to_all", expected, 1, ranks)


def region_exchange(work: Workload, stage: int, fraction: float) -> RegionExchange:
    """Return what routed and sliding-window layers of a stage exchange in a step, mean over the region ranks.

    The bound of forward is that of `Baselines`. Backward sends gradients of the same rows in fp32: for a fetched
    region 4 bytes an element, for a shipped query its gradient, the output's, and two numbers.
    """
    model, element = work.config.model, work.element_size
    first_layer = sum(work.layers_of_stage[:stage])
    kinds = [model.attention_kind(first_layer + layer) for layer in range(work.layers_of_stage[stage])]
    routed, windows = (kinds.count(kind) for kind in ("bi_level", "sliding_window"))
    bound, causal = _forward_bound(work, model.attention.query_block_size)
    window, causal_too = _forward_bound(work, model.attention.region_size, window=True)
    # With recomputation, forward runs twice.
    forwards = 2 if work.execution.recompute == "full" else 1
    row = model.head_size
    backward = max(4 / element, (row * (element + 4) + 8) / (2 * row * element + 4))
    times = work.microbatches * (forwards + backward)
    # A window's regions are fetched: its queries would be more bytes, and as many blocks ask as regions are asked of.
    certain = windows * window * work.microbatches * (forwards + 4 / element)
    return RegionExchange(
        bound=times * routed * bound + certain,
        certain=certain,
        causal_fetch=times * (routed * causal + windows * causal_too),
        fraction=fraction,
    )


def _forward_bound(work: Workload, query_block_size: int, *, window: bool = False) -> tuple[float, float]:
    """Return the most that a layer's forward exchanges, and its causal-only fetch: bytes, mean over region ranks."""
    model, ranks = work.config.model, work.layout.region
    layout = RegionLayout(model.num_regions, model.attention.region_size, ranks)
    groups = work.sequences * max(1, model.num_kv_heads // work.layout.tensor)
    topk = min(model.attention.topk, model.num_regions)
    costs = ExchangeCosts.of(
        region_size=model.attention.region_size,
        query_block_size=query_block_size,
        heads_per_group=model.num_heads // model.num_kv_heads,
        head_size=model.head_size,
        element_size=work.element_size,
    )
    blocks = layout.tokens_per_rank // query_block_size
    bound = causal = 0.0
    for rank in range(ranks):
        found = Baselines.of(layout, rank, costs, groups=groups, blocks=blocks, topk=topk, causal=model.causal)
        neighbours = min(topk - 1, layout.others(rank, model.causal) * layout.regions_per_rank)
        bound += min(found.bound, groups * neighbours * costs.region) if window else found.bound
        causal += found.causal_fetch
    return bound / ranks, causal / ranks
