"""Our model against models that others wrote: 30 lines of plain torch, and transformers' Llama.

With a route to every region and no smearing, routed attention is dense attention, and ours is a Llama. Nothing in the
oracles comes from our code: not RoPE, not the norm, not the MLP, not the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.pool import WorkerPool
from helpers.training import VOCABULARY, batch_of_step, small_config, tokens_of_step
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from biroute.configs.layout import resolve_layout
from biroute.configs.schema import RunConfig
from biroute.model.flops import forward_flops_per_sequence, routing_flops, train_flops_per_step
from biroute.model.language_model import LayerSequence, loss_function, plan_layers
from biroute.parallel.engine.engine import Microbatch
from biroute.parallel.mesh.mesh import build_mesh

Ranks = Callable[[int], WorkerPool]
Weights = dict[str, Tensor]

ALL_REGIONS: dict[str, Any] = {"region_size": 4, "topk": 8, "query_block_size": 1, "descriptors_per_region": 1}
MODELS: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "a key/value head for each head, untied, norms of the heads": {
        "num_kv_heads": 4, "tied_embeddings": False, "qk_norm": True,
    },
    "one key/value head, wide heads, another base and epsilon": {
        "num_kv_heads": 1, "head_size": 16, "rope_base": 100.0, "norm_epsilon": 0.1, "ffn_hidden_size": 40,
    },
    "blocks that share a route": {"attention": {**ALL_REGIONS, "query_block_size": 4}},
    "dense layers": {"dense_layers": [0, 1]},
    "MLM": {"objective": "mlm"},
    "MLM, dense layers, norms of the heads": {"objective": "mlm", "dense_layers": [0, 1], "qk_norm": True},
}  # fmt: skip


def oracle_config(model: dict[str, Any]) -> RunConfig:
    plain = {"num_layers": 2, "key_smear": False, "dense_layers": [], "sliding_window_layers": []}
    return small_config(model={**plain, "attention": ALL_REGIONS, **model})


def plain_transformer(weights: Weights, tokens: Tensor, config: RunConfig) -> Tensor:
    """tokens [B, S] -> logits [B, S, V] of a dense Llama in fp64, written out."""
    model = config.model
    heads, kv_heads, size = model.num_heads, model.num_kv_heads, model.head_size
    length = tokens.shape[1]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + model.norm_epsilon).sqrt() * weight

    angle = torch.arange(length).double()[:, None] / model.rope_base ** (torch.arange(0, size, 2).double() / size)
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotate(x: Tensor) -> Tensor:  # pairs (i, i + D / 2) as complex numbers
        pair = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * turn
        return torch.cat((pair.real, pair.imag), -1)

    hidden = weights["embedding.weight"][tokens]
    for layer in range(model.num_layers):
        part = {n.removeprefix(f"block.{layer}.layer."): w for n, w in weights.items() if f"block.{layer}." in n}
        qkv = norm(hidden, part["input_layernorm.weight"]) @ part["self_attention.linear_qkv.weight"].T
        qkv = qkv.view(*tokens.shape, kv_heads, heads // kv_heads + 2, size).permute(0, 2, 3, 1, 4)
        q, k, v = qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2], qkv[:, :, -1]
        if model.qk_norm:
            q = norm(q, part["self_attention.q_layernorm.weight"])
            k = norm(k, part["self_attention.k_layernorm.weight"])
        k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (rotate(k), v))
        score = rotate(q) @ k.transpose(2, 3) / math.sqrt(size)
        if model.objective == "causal":
            score = score.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        attended = (score.softmax(-1) @ v).transpose(1, 2).flatten(2)
        hidden = hidden + attended @ part["self_attention.linear_proj.weight"].T
        gate, up = (norm(hidden, part["pre_mlp_layernorm.weight"]) @ part["mlp.linear_fc1.weight"].T).chunk(2, -1)
        hidden = hidden + (gate * torch.sigmoid(gate) * up) @ part["mlp.linear_fc2.weight"].T
    head = weights["embedding.weight" if model.tied_embeddings else "head.projection.weight"]
    return norm(hidden, weights["norm.weight"]) @ head.T


def scrambled_model(config: RunConfig) -> tuple[LayerSequence, Weights]:
    """Our model with random norm weights, so that none can be left out unseen, and its weights by name."""
    torch.manual_seed(5)
    module = LayerSequence(plan_layers(config, build_mesh(resolve_layout(config, 1)).groups))
    names = {
        f"{name}.{inner}": parameter
        for name, layer in zip(module.names, module.layers, strict=True)
        for inner, parameter in layer.named_parameters()
    }
    with torch.no_grad():
        for parameter in names.values():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return module, names


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    expected = expected.float()
    torch.testing.assert_close(found, expected, rtol=0, atol=float(tolerance * expected.abs().max()))


def plain_torch_job(model: dict[str, Any]) -> int:
    config = oracle_config(model)
    module, parameters = scrambled_model(config)
    batch = batch_of_step(config, 1)
    logits = module(batch.inputs)
    found_logits = logits.detach().transpose(0, 1).clone()  # the loss works in the logits' own memory
    loss = loss_function(config.model)(logits, *batch.targets)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    weights = {name: parameter.detach().double().requires_grad_() for name, parameter in parameters.items()}
    expected = plain_transformer(weights, batch.inputs, config)
    expected_loss = F.cross_entropy(expected.flatten(0, 1), torch_labels(batch).flatten(), ignore_index=-100)
    assert_near(found_logits, expected.detach())
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=0)
    expected_gradients = torch.autograd.grad(expected_loss, list(weights.values()))
    for found, gradient in zip(gradients, expected_gradients, strict=True):
        assert_near(found, gradient, 1e-4)
    return len(gradients)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_a_plain_transformer(ranks: Ranks, name: str) -> None:
    """Logits, loss and every gradient."""
    (compared,) = ranks(1).run(plain_torch_job, MODELS[name])
    assert compared >= 14


def llama_job(model: dict[str, Any]) -> int:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = oracle_config(model)
    module, parameters = scrambled_model(config)
    ours, shape = {name: p.detach() for name, p in parameters.items()}, config.model
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.padded_vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            head_dim=shape.head_size,
            rms_norm_eps=shape.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_base},
            tie_word_embeddings=shape.tied_embeddings,
            attention_bias=False,
            mlp_bias=False,
        )
    )
    state = {"model.embed_tokens.weight": ours["embedding.weight"], "model.norm.weight": ours["norm.weight"]}
    state["lm_head.weight"] = ours["embedding.weight" if shape.tied_embeddings else "head.projection.weight"]
    for layer in range(shape.num_layers):
        here, there = f"block.{layer}.layer.", f"model.layers.{layer}."
        qkv = ours[here + "self_attention.linear_qkv.weight"].view(
            shape.num_kv_heads, -1, shape.head_size, shape.hidden_size
        )
        for name, part in (("q", qkv[:, :-2]), ("k", qkv[:, -2]), ("v", qkv[:, -1])):
            state[f"{there}self_attn.{name}_proj.weight"] = part.reshape(-1, shape.hidden_size)
        state[there + "self_attn.o_proj.weight"] = ours[here + "self_attention.linear_proj.weight"]
        gate, up = ours[here + "mlp.linear_fc1.weight"].chunk(2)
        state |= {there + "mlp.gate_proj.weight": gate, there + "mlp.up_proj.weight": up}
        state[there + "mlp.down_proj.weight"] = ours[here + "mlp.linear_fc2.weight"]
        state[there + "input_layernorm.weight"] = ours[here + "input_layernorm.weight"]
        state[there + "post_attention_layernorm.weight"] = ours[here + "pre_mlp_layernorm.weight"]
    llama.load_state_dict(state)
    inputs, labels = tokens_of_step(config, 2)
    logits = module(inputs)
    found_logits = logits.detach().transpose(0, 1).clone()
    loss = loss_function(shape)(logits, labels)
    expected = llama(inputs).logits
    expected_loss = F.cross_entropy(expected.flatten(0, 1), labels.flatten())
    assert_near(found_logits, expected.detach())
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    same = {"norm.weight": "model.norm.weight", "embedding.weight": "model.embed_tokens.weight"}
    found = torch.autograd.grad(loss, [parameters[name] for name in same])
    gradients = torch.autograd.grad(expected_loss, [llama.get_parameter(name) for name in same.values()])
    for one, other in zip(found, gradients, strict=True):
        assert_near(one, other, 1e-4)
    return found_logits.numel()


@pytest.mark.parametrize("model", [{}, {"tied_embeddings": False, "num_kv_heads": 4}], ids=["tied", "untied"])
def test_the_model_is_a_llama(ranks: Ranks, model: dict[str, Any]) -> None:
    (compared,) = ranks(1).run(llama_job, model)
    assert compared == 32 * 8 * 384


@pytest.mark.parametrize("objective", ["causal", "mlm"])
def test_the_loss_is_cross_entropy_over_the_targets(ranks: Ranks, objective: str) -> None:
    ((loss, gradient),) = ranks(1).run(loss_job, objective)
    assert loss < 1e-6
    assert gradient < 1e-8


def torch_labels(batch: Microbatch) -> Tensor:
    """The labels as `F.cross_entropy` takes them: -100 where nothing is to be predicted."""
    return batch.labels if batch.loss_mask is None else batch.labels.where(batch.loss_mask, -100)


def loss_job(objective: str) -> tuple[float, float]:
    """How far loss and gradient of the logits are from torch's."""
    config = small_config(model={"objective": objective})
    build_mesh(resolve_layout(config, 1))
    batch = batch_of_step(config, 3)
    labels = torch_labels(batch)
    logits = torch.randn(*labels.t().shape, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3
    logits.requires_grad_()
    expected = F.cross_entropy(logits.transpose(0, 1).flatten(0, 1), labels.flatten(), ignore_index=-100)
    found = loss_function(config.model)(logits.clone(), *batch.targets)
    (found_gradient,), (gradient,) = torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits)
    return float((found - expected).abs()), float((found_gradient - gradient).abs().max())


def counted_flops_job(kind: str) -> tuple[int, int, int, int, int, int]:
    """torch's own count of forward, of forward and backward, and of routing; then ours."""
    model = {"objective": "mlm", "attention": {**ALL_REGIONS, "topk": 4, "kind": kind}}
    config = oracle_config(model | {"sequence_length": 64, "tied_embeddings": False})
    module, _ = scrambled_model(config)
    inputs = tokens_of_step(config, 1)[0][:3]
    core = module.layers[1].layer.self_attention.core_attention
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        loss = module(inputs).sum()
    with FlopCounterMode(display=False) as backward, sdpa_kernel(SDPBackend.MATH):
        loss.backward()
    with FlopCounterMode(display=False) as routing:
        core.route(torch.randn(1, 4, 64, 8), torch.randn(1, 2, 64, 8))
    one_step = config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": 3})})
    counted = forward.get_total_flops(), backward.get_total_flops(), routing.get_total_flops()
    return *counted, 3 * forward_flops_per_sequence(config), train_flops_per_step(one_step), routing_flops(config, 0)


def test_operations_are_those_that_torch_counts(ranks: Ranks) -> None:
    """Dense attention, where torch sees every product. The embedding's backward is none."""
    ((forward, backward, _, expected_forward, expected_both, _),) = ranks(1).run(counted_flops_job, "dense")
    assert forward == expected_forward
    assert forward + backward == expected_both


def test_operations_of_routing_are_those_that_torch_counts(ranks: Ranks) -> None:
    ((_, _, routing, expected_forward, expected_both, expected),) = ranks(1).run(counted_flops_job, "bi_level")
    assert routing == expected > 0
    assert expected_both == 3 * expected_forward - 2 * 3 * 2 * expected  # 3 sequences, 2 layers: no backward
