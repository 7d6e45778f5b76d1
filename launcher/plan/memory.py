"""Memory of a rank at its peak, part by part, from sizes alone. No torch.

Activations are what the blocks of `model/block.py` keep for backward, tensor by tensor. A part that is only there for
a moment (the logits, a bucket of gradients) counts in full: the peak is where most of them meet.

Source: Korthikanti et al. 2022 (arXiv:2205.05198), section 4, for what is kept and what recomputation saves;
Rajbhandari et al. 2020 (arXiv:1910.02054), section 5, for ZeRO; Narayanan et al. 2021 (arXiv:2104.04473), section
2.2, for the microbatches in flight.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from biroute.launcher.plan.communication import region_exchange
from biroute.launcher.plan.workload import Workload

BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's reduce_bucket_size and allreduce_bucket_size
LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at the peak, by part."""

    weights: float
    gradients: float
    optimizer: float  # fp32 master weights and AdamW's two moments
    activations: float  # kept for backward, of all microbatches in flight
    recomputed: float  # of the one block that is being recomputed
    logits: float
    routing: float  # routes, descriptors
    exchange: float  # regions and queries that came from other region ranks, kept for backward
    buffers: float  # of DeepSpeed: a bucket of gradients, gathered weights

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Return the parts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def peak_memory(work: Workload, exchange_fraction: float) -> tuple[Memory, int]:
    """Return the memory of the pipeline stage that needs most, and its number from 0.

    Args:
        work: configuration, layout and execution.
        exchange_fraction: of the bound, what routed layers exchange between region ranks.
    """
    stages = sorted({0, min(1, work.layout.pipe - 1), work.layout.pipe - 1})
    found = [(memory_of_stage(work, stage, exchange_fraction), stage) for stage in stages]
    return max(found, key=lambda pair: pair[0].total)


def memory_of_stage(work: Workload, stage: int, exchange_fraction: float) -> Memory:
    """Return the memory of a rank of pipeline stage `stage`."""
    execution, layers = work.execution, work.layers_of_stage[stage]
    last = stage == work.layout.pipe - 1
    weights, gradients, optimizer = _states(work, stage)
    in_flight = microbatches_in_flight(work, stage)
    kept, whole = _kept_of_block(work), activations_of_block(work)
    # The last norm's input in fp32, and its output.
    norm = work.tokens * work.config.model.hidden_size * (4 + work.element_size) / work.residual_ranks
    norm += _normalized(work)
    received = 0.0
    if work.layout.region > 1:
        # `expected` counts a step's forward and backward; forward of one microbatch is about half of its share.
        received = region_exchange(work, stage, exchange_fraction).expected / (2 * work.microbatches)
    routes, gathered = _routing(work, stage)
    activations = in_flight * (layers * kept + last * norm)
    recomputed = 0.0 if execution.recompute == "none" else whole - kept
    recomputed += 2 * _whole_input(work)  # its two gradients, of the MLP's two halves
    logit_bytes = execution.logit_bytes + work.microbatches * execution.output_bytes
    logits = work.tokens * work.config.padded_vocab_size / work.layout.tensor * logit_bytes * last
    logits += 2 * _whole_input(work) * last  # of the LM head: its input, and the gradient
    buffers = _buffers(work, stage)
    if execution.on_cpu and work.layout.zero_stage < 3:
        # The bucket fills as backward frees activations, or after it.
        after = 0.0 if work.layout.zero_stage == 2 else recomputed + logits
        buffers = max(0.0, buffers - activations - after)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        recomputed=recomputed,
        logits=logits,
        routing=(1 / max(1, layers) if execution.recompute == "full" else in_flight) * routes + gathered,
        exchange=received if execution.recompute != "full" else received / max(1, layers),
        buffers=buffers,
    )


def microbatches_in_flight(work: Workload, stage: int) -> float:
    """Return the microbatches whose activations a stage holds at once, under 1F1B or its interleaved form."""
    stages, parts = work.layout.pipe, work.execution.virtual_stages
    if stages == 1:
        return 1.0
    most = stages - stage + (stages - 1) * (parts > 1) / parts
    return min(float(work.microbatches), most)


def _states(work: Workload, stage: int) -> tuple[float, float, float]:
    """Return the bytes of weights, gradients and optimizer; ZeRO 1 divides the last, 2 the last two, 3 all."""
    parameters, zero = work.parameters_of_stage(stage), work.layout.zero_stage
    sizes = zip(work.execution.state_bytes, (3, 2, 1), strict=True)
    weights, gradients, optimizer = (
        parameters * size / (work.data_ranks if zero >= divided_from else 1) for size, divided_from in sizes
    )
    return weights, gradients, optimizer


def _kept_of_block(work: Workload) -> float:
    """Return the bytes that a block keeps for backward of one microbatch."""
    model, recompute = work.config.model, work.execution.recompute
    block_input = work.tokens * model.hidden_size * work.element_size / work.residual_ranks
    if recompute == "full":
        return block_input
    if recompute == "alternate":
        # Queries, values, the first half of the MLP, its output; and the output of attention.
        outputs = 2 * work.query_size + work.key_size + model.ffn_hidden_size
        return 2 * block_input + work.tokens * work.element_size * outputs / work.layout.tensor
    whole = activations_of_block(work)
    return whole - _scores(work) if recompute == "selective" else whole


def activations_of_block(work: Workload) -> float:
    """Return the bytes that a block of one microbatch holds at its backward."""
    model, element = work.config.model, work.element_size
    # The input of both norms in fp32 (of fp32 hidden states it is the residual stream itself), and their outputs.
    residual = model.hidden_size * (2 * 4 + 2 * element) / work.residual_ranks
    # Queries, keys and values as projected; queries and keys rotated; the output, and a copy for the next matrix.
    smeared = work.key_size if model.key_smear else 0
    attention = element * (4 * work.query_size + 3 * work.key_size + smeared) + 4 * model.num_heads
    mlp = element * work.execution.mlp_tensors * model.ffn_hidden_size
    norms = 8 * (work.query_size + work.key_size) if model.qk_norm else 0
    of_norms = residual + 2 * _normalized(work) / work.tokens
    gathered = 2 * _whole_input(work) * (1 - 1 / work.residual_ranks)  # of attention and MLP
    return work.tokens * (of_norms + (attention + mlp + norms) / work.layout.tensor) + gathered + _scores(work)


def _whole_input(work: Workload) -> float:
    """Return the bytes of a matrix's input where tensor ranks keep it gathered, else 0."""
    kept = work.execution.whole_inputs and work.residual_ranks > 1
    return float(work.tokens * work.config.model.hidden_size * work.element_size * kept)


def _normalized(work: Workload) -> float:
    """Return the bytes of a norm's normalized input, where it is kept."""
    if not work.execution.on_cpu:
        return 0.0
    return 4.0 * work.tokens * work.config.model.hidden_size / work.residual_ranks


def _scores(work: Workload) -> float:
    """Return the bytes of softmax, dropout and mask where attention keeps its scores: 5 H S for each token."""
    if not work.execution.keeps_scores:
        return 0.0
    model = work.config.model
    return 5.0 * model.num_heads * model.sequence_length * work.tokens / work.layout.tensor


def _routing(work: Workload, stage: int) -> tuple[float, float]:
    """Return the bytes of a microbatch's routes (int64), kept for backward, and of the descriptors of one layer."""
    model, attention = work.config.model, work.config.model.attention
    first_layer = sum(work.layers_of_stage[:stage])
    heads = model.num_kv_heads / work.layout.tensor
    routes = 0.0
    for layer in range(first_layer, first_layer + work.layers_of_stage[stage]):
        kind = model.attention_kind(layer)
        if kind != "dense":
            block = attention.region_size if kind == "sliding_window" else attention.query_block_size
            routes += 8.0 * heads * work.tokens / block * min(attention.topk, model.num_regions)
    descriptors = model.num_regions * attention.descriptors_per_region * model.head_size
    return routes, 4.0 * work.sequences * heads * descriptors if routes else 0.0


def _buffers(work: Workload, stage: int) -> float:
    """Return the bytes of a bucket of gradients in fp32, and in stage 3 of the weights that are gathered at once."""
    parameters, element = work.parameters_of_stage(stage), work.element_size
    if work.execution.gathers == "once":
        # With no more microbatches than stages, an interleaved schedule has all backward passes of one part behind
        # it, and that part's gradients divided, before the next part's begin (Narayanan et al., figure 4).
        parts = work.execution.virtual_stages if work.microbatches <= work.layout.pipe else 1
        block = 4.0 * work.block_matrices / work.layout.tensor  # of its gradients, in the order of the ranks
        return (element + 4.0 / parts) * parameters + block
    if work.execution.gathers == "blocks":
        # The weights of this block and the next one, and this block's gradients before they are scattered.
        return 3 * element * (work.block_matrices + work.embedding) / work.layout.tensor
    buckets = 2 if work.config.parallel.overlap_grad_reduce and work.layout.zero_stage == 2 else 1
    bucket = 4.0 * buckets * min(parameters, BUCKET_ELEMENTS)
    gathered = element * min(parameters, LIVE_PARAMETERS) if work.layout.zero_stage == 3 else 0.0
    return bucket + gathered
