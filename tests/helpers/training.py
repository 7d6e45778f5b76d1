"""A small model and its data for tests, trained by our engine on any layout or by plain torch in one process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from biroute.configs.layout import resolve_layout
from biroute.configs.load import config_from_tree
from biroute.configs.schema import RunConfig
from biroute.launcher.train.schedule import learning_rate
from biroute.model.language_model import LayerSequence, loss_function, plan_layers
from biroute.parallel.checkpoint.reshard import reshard
from biroute.parallel.engine.engine import Engine, Microbatch, build_engine
from biroute.parallel.mesh.mesh import Mesh, build_mesh

VOCABULARY = 300
MASK = 2  # the token that hides another one; `tokens_of_step` draws none
CPU = torch.device("cpu")


def small_config(**sections: dict[str, Any]) -> RunConfig:
    """Four layers, GQA, per-token routes; `sections` override single fields."""
    tree: dict[str, dict[str, Any]] = {
        "model": {
            "hidden_size": 32,
            "num_layers": 4,
            "num_heads": 4,
            "num_kv_heads": 2,
            "sequence_length": 32,
            "init_std": 0.1,
            "dense_layers": [1],
            "sliding_window_layers": [2],
            "attention": {"region_size": 4, "topk": 3, "descriptors_per_region": 1},
        },
        "data": {"tokenizer": {"vocab_size": VOCABULARY}},
        # epsilon: where a gradient is rounding noise, AdamW would turn the noise into a full step.
        "optim": {"learning_rate": 3e-3, "warmup_steps": 1, "gradient_clip": 0.5, "epsilon": 1e-5},
        "train": {"global_batch_size": 8, "microbatch_size": 2, "steps": 8, "evaluate_sequences": 8},
    }
    for section, fields in sections.items():
        tree.setdefault(section, {}).update(fields)
    return config_from_tree(tree, "test")


def tokens_of_step(config: RunConfig, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels of a whole step, [global_batch_size, S] each; a pure function of the step."""
    generator = torch.Generator().manual_seed(1000 + step)
    batch, length = config.train.global_batch_size, config.model.sequence_length
    tokens = torch.randint(3, VOCABULARY, (batch, length + 1), generator=generator)
    if config.model.causal:
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    inputs, labels = tokens[:, :-1].clone(), tokens[:, :-1].clone()
    for row in range(batch):
        inputs[row, torch.randperm(length, generator=generator)[: config.model.masked_tokens]] = MASK
    return inputs, labels


def batch_of_step(config: RunConfig, step: int) -> Microbatch:
    """A whole step as one microbatch."""
    return microbatch_of(config, *tokens_of_step(config, step))


def microbatch_of(config: RunConfig, inputs: Tensor, labels: Tensor) -> Microbatch:
    """Tokens of `tokens_of_step` with the loss mask of the model's objective."""
    return Microbatch(inputs, labels, None if config.model.causal else inputs == MASK)


def microbatches(config: RunConfig, mesh: Mesh, step: int) -> list[Microbatch]:
    """This data rank's microbatches of a step."""
    inputs, labels = (mesh.own_tokens(x.chunk(mesh.layout.data)[mesh.at.data]) for x in tokens_of_step(config, step))
    size = config.train.microbatch_size
    return [microbatch_of(config, x, y) for x, y in zip(inputs.split(size), labels.split(size), strict=True)]


def start_engine(config: RunConfig, *, draw_weights: bool = True) -> Engine:
    """The engine of `config` on all ranks of this process group."""
    mesh = build_mesh(resolve_layout(config, dist.get_world_size()))
    return build_engine(config, mesh, CPU, draw_weights=draw_weights)


def train(engine: Engine, steps: Iterable[int]) -> list[tuple[float, float]]:
    """Loss and gradient norm of each of the steps (counted from 1)."""
    config = engine.config
    reports = [
        engine.train_step(
            microbatches(config, engine.mesh, step), learning_rate(config.optim, step, config.train.steps)
        )
        for step in steps
    ]
    return [(report.loss, report.gradient_norm) for report in reports]


Shards = dict[str, tuple[int, tuple[int, int] | None, dict[str, Tensor]]]


def shards_of(engine: Engine, values: dict[str, dict[str, Tensor]]) -> Shards:
    """`values` by parameter name with this rank's place in each, for `merge`."""
    return {
        name: (
            engine.mesh.at.tensor,
            (parameter.partition_dim, parameter.partition_stride)
            if getattr(parameter, "tensor_model_parallel", False)
            else None,
            values[name],
        )
        for name, parameter in engine.named_parameters()
    }


def merge(ranks: list[Shards]) -> dict[str, dict[str, Tensor]]:
    """Whole tensors from the shards of all ranks; replicas must agree to the bit."""
    places: dict[str, dict[int, tuple[tuple[int, int] | None, dict[str, Tensor]]]] = {}
    for shards in ranks:
        for name, (tensor_rank, split, values) in shards.items():
            known = places.setdefault(name, {}).setdefault(tensor_rank, (split, values))
            for key, value in values.items():
                assert torch.equal(known[1][key], value), f"replicas of {name} {key} differ"
    merged = {}
    for name, by_rank in places.items():
        split, first = by_rank[0]
        merged[name] = {
            key: first[key]
            if split is None
            else reshard([by_rank[rank][1][key] for rank in sorted(by_rank)], *split, 1, 0)
            for key in first
        }
    return merged


def plain_torch_run(
    config: RunConfig, steps: int | Sequence[int]
) -> tuple[list[tuple[float, float]], dict[str, dict[str, Tensor]]]:
    """The same training with torch alone, one process, whole batch at once: what every layout must equal."""
    mesh = build_mesh(resolve_layout(config, 1))
    module = LayerSequence(plan_layers(config, mesh.groups))
    names = {
        f"{name}.{inner}": parameter
        for name, layer in zip(module.names, module.layers, strict=True)
        for inner, parameter in layer.named_parameters()
    }
    matrices = [p for p in names.values() if p.dim() > 1]
    vectors = [p for p in names.values() if p.dim() == 1]
    optim = config.optim
    adam = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": optim.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
    )
    loss_of, reports, gradients = loss_function(config.model), [], {}
    for step in range(1, steps + 1) if isinstance(steps, int) else steps:
        batch = batch_of_step(config, step)
        loss = loss_of(module(batch.inputs), *batch.targets)
        adam.zero_grad()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in names.items() if p.grad is not None}
        norm = nn.utils.clip_grad_norm_(module.parameters(), optim.gradient_clip)
        for group in adam.param_groups:
            group["lr"] = learning_rate(optim, step, config.train.steps)
        adam.step()
        reports.append((float(loss.detach()), float(norm)))
    return reports, {name: {"weight": p.detach(), "gradient": gradients[name]} for name, p in names.items()}
