"""Exact counts of floating-point operations; a multiply and an add are two. No torch: a login node runs this."""

from __future__ import annotations

from biroute.configs.schema import RunConfig


def attended_pairs(config: RunConfig, layer: int) -> int:
    """(query, key) pairs that one query head of block `layer` computes over one sequence."""
    model = config.model
    tokens, size = model.sequence_length, model.attention.region_size
    if model.attention_kind(layer) == "dense":
        return tokens * (tokens + 1) // 2 if model.causal else tokens * tokens
    topk = min(model.attention.topk, model.num_regions)
    if not model.causal:
        return tokens * topk * size
    # Region r has r regions before it, of which it attends min(r, topk - 1); its own one is a triangle.
    others = topk - 1
    earlier = others * (others - 1) // 2 + (model.num_regions - others) * others
    return earlier * size * size + model.num_regions * (size * (size + 1) // 2)


def routing_flops(config: RunConfig, layer: int) -> int:
    """Operations of the affinity between query blocks and descriptors of block `layer` over one sequence."""
    model = config.model
    if model.attention_kind(layer) != "bi_level" or model.attention.router == "random":
        return 0
    blocks = model.sequence_length // model.attention.query_block_size
    descriptors = model.num_regions * model.attention.descriptors_per_region
    return 2 * blocks * descriptors * model.num_kv_heads * model.head_size


def forward_flops_per_sequence(config: RunConfig) -> int:
    """Operations of one forward pass over one sequence: all matrix products, attention and routing."""
    model = config.model
    query_size = model.num_heads * model.head_size
    key_size = model.num_kv_heads * model.head_size
    weights_per_block = (
        model.hidden_size * (query_size + 2 * key_size)
        + query_size * model.hidden_size
        + 3 * model.hidden_size * model.ffn_hidden_size
    )
    weights = model.num_layers * weights_per_block + model.hidden_size * config.padded_vocab_size
    attention = sum(4 * attended_pairs(config, layer) * query_size for layer in range(model.num_layers))
    routing = sum(routing_flops(config, layer) for layer in range(model.num_layers))
    return 2 * weights * model.sequence_length + attention + routing


def train_flops_per_step(config: RunConfig) -> int:
    """Model operations of one optimizer step: backward costs twice the forward pass, recomputation is not counted.

    Routing has no backward: its choice carries no gradient.
    """
    routing = sum(routing_flops(config, layer) for layer in range(config.model.num_layers))
    per_sequence = 3 * forward_flops_per_sequence(config) - 2 * routing
    return per_sequence * config.train.global_batch_size


def parameter_count(config: RunConfig) -> int:
    """Trained parameters of the whole model, padding of the vocabulary included."""
    model = config.model
    query_size = model.num_heads * model.head_size
    key_size = model.num_kv_heads * model.head_size
    block = (
        model.hidden_size * (2 * query_size + 2 * key_size)
        + 3 * model.hidden_size * model.ffn_hidden_size
        + 2 * model.hidden_size
        + (2 * model.head_size if model.qk_norm else 0)
        + (key_size if model.key_smear else 0)
    )
    embeddings = (1 if model.tied_embeddings else 2) * config.padded_vocab_size * model.hidden_size
    return model.num_layers * block + embeddings + model.hidden_size
