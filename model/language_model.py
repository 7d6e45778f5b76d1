"""The model as ONE list of layers: embedding, blocks, norm, head.

The same list becomes a plain sequence of modules or the stages of a pipeline; nothing else knows the difference.

Shapes: B sequences, S tokens, C hidden size, V padded vocabulary, T tensor ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)
from torch import Tensor, nn

from biroute.configs.schema import ModelConfig, RunConfig
from biroute.model.attention.grid import KERNEL_DEVICES
from biroute.model.attention.sequence_shard import SequenceShard
from biroute.model.block import Block, drawn_on_cpu, fill_with_nan, megatron_config
from biroute.model.cross_entropy import cross_entropy_in_place
from biroute.model.exact_sums import ExactColumnParallelLinear, exact_product
from biroute.model.norm import RMSNorm


@dataclass(frozen=True)
class LayerPlan:
    """One layer, not yet built. Layers of the same name are one module used twice (tied embeddings)."""

    name: str
    module_class: type[nn.Module]
    arguments: dict[str, Any] = field(repr=False)
    seed: int

    def build(self) -> nn.Module:
        """The module, its weights drawn from its own seed: the same whatever stage it lands on."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)  # the CPU's; a GPU's goes on undisturbed
            return self.module_class(**self.arguments)


def plan_layers(
    config: RunConfig,
    groups: ProcessGroupCollection,
    shard: SequenceShard | None = None,
    *,
    draw_weights: bool = True,
) -> list[LayerPlan]:
    """Plan the layers of the model, in order.

    Args:
        config: of the run.
        groups: the process groups that weights are split over.
        shard: this rank's part of the sequences, where ranks share them.
        draw_weights: False where all weights are loaded before they are used; every matrix is NaN until then.
    """
    model = config.model
    sequence_parallel = config.parallel.sequence_parallel and groups.tp.size() > 1
    common = {"model": model, "groups": groups, "sequence_parallel": sequence_parallel}
    train = config.train
    common |= {"exact_sums": train.exact_sums, "draw_weights": draw_weights}
    vocabulary = {"matrix": VocabularyMatrix(**common, vocab_size=config.padded_vocab_size)}
    block = {**common, "activation_checkpointing": train.activation_checkpointing, "shard": shard}
    norm = {"hidden_size": model.hidden_size, "eps": model.norm_epsilon}
    norm |= {"partial_gradient_group": groups.tp} if sequence_parallel else {}
    plans: list[tuple[str, type[nn.Module], dict[str, Any]]] = [("embedding", Embedding, vocabulary)]
    plans += [(f"block.{layer}", Block, {**block, "layer": layer}) for layer in range(model.num_layers)]
    plans += [("norm", RMSNorm, norm)]
    plans += [("embedding", Embedding, vocabulary)] if model.tied_embeddings else [("head", Head, vocabulary)]
    return [
        # A wide stride keeps the seeds of neighbouring runs (seed, seed + 1, ...) apart.
        LayerPlan(name, module_class, arguments, seed=config.train.seed * 100_003 + position)
        for position, (name, module_class, arguments) in enumerate(plans)
    ]


class LayerSequence(nn.Module):
    """The planned layers one after the other; layers of the same name are one module."""

    def __init__(self, plans: list[LayerPlan], device: torch.device | None = None) -> None:
        """Build the layers, one after the other on the CPU, each moved to `device` before the next is built."""
        super().__init__()
        self.names = list(dict.fromkeys(plan.name for plan in plans))
        self.order = [self.names.index(plan.name) for plan in plans]
        first = {plan.name: plan for plan in reversed(plans)}
        self.layers = nn.ModuleList(first[name].build().to(device) for name in self.names)

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters by name, equal in every layout."""
        for name, module in zip(self.names, self.layers, strict=True):
            yield from module.named_parameters(prefix=name)

    def hidden_states(self, x: Tensor) -> Tensor:
        """Tokens [B, S] -> what the head gets, after the last norm: [S, B, C]."""
        for position in self.order[:-1]:
            x = self.layers[position](x)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [S, B, C], of all tokens or of some -> logits [S, B, V / T]."""
        logits: Tensor = self.layers[self.order[-1]](hidden)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, S] -> logits [S, B, V / T]."""
        return self.logits(self.hidden_states(x))


@dataclass(frozen=True)
class VocabularyMatrix:
    """The matrix [V, C] of an embedding or a head: its size, and how it is drawn and split over the tensor ranks."""

    model: ModelConfig
    vocab_size: int
    groups: ProcessGroupCollection
    sequence_parallel: bool
    exact_sums: bool
    draw_weights: bool

    def for_megatron(self) -> dict[str, Any]:
        """Return the arguments that Megatron-core's embedding and its linear layer have in common."""
        draw = drawn_on_cpu(partial(nn.init.normal_, mean=0.0, std=self.model.init_std))
        return {
            "init_method": draw if self.draw_weights else fill_with_nan,
            "config": megatron_config(self.model, self.groups.tp.size(), self.sequence_parallel, self.draw_weights),
            "tp_group": self.groups.tp,
        }


class Embedding(VocabParallelEmbedding):
    """Token embedding; given hidden states instead of tokens it is the tied head.

    One forward for both uses, because ZeRO-3 gathers a module's weight when the module is called, and only then.
    With `sequence_parallel` the hidden states are of this tensor rank's tokens, [S / T, B, C].
    """

    def __init__(self, matrix: VocabularyMatrix) -> None:
        super().__init__(
            matrix.vocab_size,
            matrix.model.hidden_size,
            reduce_scatter_embeddings=matrix.sequence_parallel,
            **matrix.for_megatron(),
        )
        self.product = exact_product if matrix.exact_sums else F.linear

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, S] int64 -> [S, B, C]; or hidden states [S, B, C] -> logits [S, B, V / T]."""
        scattered = self.reduce_scatter_embeddings
        if x.is_floating_point():
            every_token = gather_from_sequence_parallel_region if scattered else copy_to_tensor_model_parallel_region
            return self.product(every_token(x, group=self.tp_group), self.weight)
        # Where it scatters, Megatron-core itself puts the tokens first.
        return super().forward(x if scattered else x.t().contiguous())


class Head(nn.Module):
    """Untied output projection, [S, B, C] (`sequence_parallel`: [S / T, B, C]) -> logits [S, B, V / T]."""

    def __init__(self, matrix: VocabularyMatrix) -> None:
        super().__init__()
        linear = ExactColumnParallelLinear if matrix.exact_sums else ColumnParallelLinear
        self.projection = linear(matrix.model.hidden_size, matrix.vocab_size, bias=False, **matrix.for_megatron())

    def forward(self, hidden: Tensor) -> Tensor:
        return self.projection(hidden)[0]


class Loss(Protocol):
    """loss(logits [S, B, V / T], labels [B, S], loss_mask [B, S] or None) -> mean cross-entropy in nats, a scalar."""

    def __call__(self, logits: Tensor, labels: Tensor, loss_mask: Tensor | None = None) -> Tensor: ...


def loss_function(config: ModelConfig, region_ranks: int = 1) -> Loss:
    """The cross-entropy of a microbatch over the labels that `loss_mask` marks, or over all of them without one.

    The mean is over the targets that every sequence has by construction, never over those counted, so that the
    mean over microbatches and ranks is the exact global mean: also where `region_ranks` share a sequence, and with it
    its targets, unevenly. On a GPU the gradient takes the logits' memory (`cross_entropy.py`).
    """
    targets_per_sequence = (config.sequence_length if config.causal else config.masked_tokens) / region_ranks

    def loss(logits: Tensor, labels: Tensor, loss_mask: Tensor | None = None) -> Tensor:
        if logits.device.type in KERNEL_DEVICES and logits.dtype != torch.float64:
            weights = torch.ones_like(labels, dtype=torch.float32) if loss_mask is None else loss_mask.float()
            weights = weights / (targets_per_sequence * labels.shape[0])
            return cross_entropy_in_place(logits, labels.t(), weights.t())
        losses = vocab_parallel_cross_entropy(logits.float(), labels.t().contiguous())
        if loss_mask is not None:
            losses = losses * loss_mask.t()
        return losses.sum() / (targets_per_sequence * labels.shape[0])

    return loss
