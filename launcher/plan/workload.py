"""What one rank has to do in a step: sizes that memory, communication and time are computed from. No torch.

Letters as in docs/architecture.md: S tokens, C hidden size, H and G heads, D head size, F inner width of the MLP, V
padded vocabulary, T tensor ranks, P region ranks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from biroute.configs.layout import Layout, microbatches_per_step
from biroute.configs.schema import RunConfig
from biroute.model.flops import attended_pairs, routing_flops

# Of the loss for each logit: forward reads it, writes it in fp32, takes the maximum, exponentiates and divides in
# place; backward subtracts in place and writes the gradient.
LOSS_BYTES = 28.0
# selective: attention alone; alternate: all but attention's output and every second matrix product (torchtitan).
Recomputation = Literal["none", "selective", "alternate", "full"]


@dataclass(frozen=True)
class Execution:
    """How a system carries out a layout. `of` says what BiRoute does; public runs of other systems differ in it."""

    recompute: Recomputation
    # Axes whose communication runs beside computation: it takes time only where it lasts longer.
    hidden: frozenset[str]
    # Bytes of a parameter: weight, gradient and optimizer (master weight and moments), before ZeRO divides them.
    state_bytes: tuple[float, float, float]
    logit_bytes: float  # at the peak, for each token and word
    loss_bytes: float = LOSS_BYTES  # that the loss reads and writes for each, forward and backward
    virtual_stages: int = 1  # parts of the model that each pipeline stage holds (interleaved schedule)
    reduces_each_microbatch: bool = False  # gradients are summed over data ranks after each microbatch
    reduction: Literal["all_reduce", "reduce_scatter"] = "all_reduce"  # how gradients are summed
    reduction_bytes: float = 4.0  # an element of a gradient as it travels
    # What an MLP keeps for backward, in times its width: both halves of the first matrix and their product, where
    # silu and product are one kernel.
    mlp_tensors: float = 3.0
    keeps_scores: bool = False  # attention writes its S x S scores to memory, and computes both halves of them
    norm_passes: float = 20.0  # bytes that a norm reads and writes for each element, forward
    # On CPUs PyTorch's norms keep their normalized input for backward, in fp32, and a buffer takes no memory before
    # it is written.
    on_cpu: bool = False
    scatters_sends: bool = False  # tensor ranks that hold the same hidden states send a share each to the next stage
    even_regions: bool = False  # region ranks share causal dense attention evenly
    # Fully sharded weights (FSDP): gathered block by block and then freed, or kept with whole fp32 gradients until
    # the last microbatch.
    gathers: Literal["buckets", "blocks", "once"] = "buckets"
    # Tensor ranks with sequence parallelism keep the gathered input of a matrix for backward (DTensor), instead of
    # gathering it again (Megatron).
    whole_inputs: bool = False
    output_bytes: float = 0.0  # that a pipeline keeps to the end of a step, for each token and word of its output

    @classmethod
    def of(cls, config: RunConfig, *, cpu: bool = False) -> Execution:
        """What BiRoute does with `config` on GPUs, or on CPUs."""
        stage, bf16 = config.parallel.zero_stage, config.train.precision == "bf16"
        element = 2.0 if bf16 else 4.0
        return cls(
            recompute="full" if config.train.activation_checkpointing else "none",
            # DeepSpeed gathers and reduces beside computation in stage 3, and in stage 2 if asked (overlap_comm).
            hidden=frozenset({"region", "data"} if stage == 3 or config.parallel.overlap_grad_reduce else {"region"}),
            # Without ZeRO there is no copy of the weights; with it there is one in fp32, also of fp32 weights.
            state_bytes=(element, 4.0, 8.0 if stage == 0 else 12.0),
            # The gradient takes the logits' memory. In bf16 a CPU keeps the softmax in fp32, too.
            logit_bytes=element + 4.0 if bf16 and config.train.device == "cpu" else element,
            # On a GPU logits are read twice, and their gradient is written once.
            loss_bytes=LOSS_BYTES if cpu else 3 * element,
            reduces_each_microbatch=stage >= 2,
            reduction="reduce_scatter" if stage == 3 else "all_reduce",
            # On a CPU, in fp32 of a bf16 input: a copy to fp32, the norm, a copy back.
            norm_passes=2 * element + (16.0 if cpu and bf16 else 0.0),
            mlp_tensors=5.0 if cpu else 3.0,  # also silu of the one half, and a copy of the other
            on_cpu=cpu,
        )


@dataclass(frozen=True)
class Workload:
    """A configuration on a layout; all sizes are of one rank, and of one microbatch where nothing else is said."""

    config: RunConfig
    layout: Layout
    execution: Execution

    @property
    def element_size(self) -> int:
        """Bytes of an element of weights and activations."""
        return 2 if self.config.train.precision == "bf16" else 4

    @property
    def microbatches(self) -> int:
        """Microbatches of a data rank in a step."""
        return microbatches_per_step(self.config, self.layout)

    @property
    def sequences(self) -> int:
        """Sequences of a microbatch (B)."""
        return self.config.train.microbatch_size

    @property
    def tokens(self) -> float:
        """Tokens of a microbatch on one rank: B S / P."""
        return self.sequences * self.config.model.sequence_length / self.layout.region

    @property
    def data_ranks(self) -> int:
        """Ranks that share gradients: region ranks count as data ranks."""
        return self.layout.data * self.layout.region

    @property
    def query_size(self) -> int:
        """H D."""
        return self.config.model.num_heads * self.config.model.head_size

    @property
    def key_size(self) -> int:
        """G D."""
        return self.config.model.num_kv_heads * self.config.model.head_size

    @property
    def residual_ranks(self) -> int:
        """Ranks that share the tokens of norms and residuals."""
        return self.layout.tensor if self.config.parallel.sequence_parallel else 1

    @cached_property
    def layers_of_stage(self) -> list[int]:
        """Blocks of each pipeline stage. Where they do not divide, those in the middle get one more."""
        stages, layers = self.layout.pipe, self.config.model.num_layers
        least, more = divmod(layers, stages)
        first = (stages - more + 1) // 2
        return [least + (first <= stage < first + more) for stage in range(stages)]

    @property
    def block_matrices(self) -> int:
        """Elements of a block's matrices, over all tensor ranks."""
        model = self.config.model
        return model.hidden_size * (2 * self.query_size + 2 * self.key_size + 3 * model.ffn_hidden_size)

    @property
    def embedding(self) -> int:
        """Elements of the embedding, over all tensor ranks: V C."""
        return self.config.padded_vocab_size * self.config.model.hidden_size

    def parameters_of_stage(self, stage: int) -> float:
        """Parameters of a rank of pipeline stage `stage`, before ZeRO divides them."""
        return sum(size * count for size, count in self.tensors_of_stage(stage).items())

    def tensors_of_stage(self, stage: int) -> Counter[float]:
        """Elements of each parameter of a rank -> how many such parameters a stage has."""
        model, tensor, layers = self.config.model, self.layout.tensor, self.layers_of_stage[stage]
        width = model.hidden_size
        found: Counter[float] = Counter()
        for size in (
            width * (self.query_size + 2 * self.key_size),
            width * self.query_size,
            2 * width * model.ffn_hidden_size,
            width * model.ffn_hidden_size,
            *([self.key_size] if model.key_smear else []),
        ):
            found[size / tensor] += layers
        found[width] += 2 * layers
        found[model.head_size] += 2 * layers * model.qk_norm
        first, last = stage == 0, stage == self.layout.pipe - 1
        found[self.embedding / tensor] += first + last - (first and last and model.tied_embeddings)
        found[width] += last
        return found

    @property
    def linear_flops(self) -> float:
        """Operations of a block's matrix products, forward."""
        return 2 * self.block_matrices * self.tokens / self.layout.tensor

    @property
    def head_flops(self) -> float:
        """Operations of the LM head, forward."""
        return 2 * self.embedding * self.tokens / self.layout.tensor

    @cached_property
    def attention_flops(self) -> float:
        """Operations of attention, forward, mean over the blocks, of the slowest region rank."""
        per_sequence = sum(self._layer_attention_flops(layer) for layer in range(self.config.model.num_layers))
        ranks = self.layout.tensor * self.layout.region
        return per_sequence * self.sequences / (self.config.model.num_layers * ranks)

    def _layer_attention_flops(self, layer: int) -> float:
        model, ranks = self.config.model, self.layout.region
        pairs: float = attended_pairs(self.config, layer)
        if model.causal and model.attention_kind(layer) == "dense":
            if self.execution.keeps_scores:
                pairs = model.sequence_length**2
            elif not self.execution.even_regions:
                pairs *= 2 - 1 / ranks  # the last rank's queries see all tokens, those of the mean rank half of them
        return 4 * pairs * self.query_size

    @cached_property
    def routing_flops(self) -> float:
        """Operations of choosing regions, forward, mean over the blocks."""
        layers = range(self.config.model.num_layers)
        per_sequence = sum(routing_flops(self.config, layer) for layer in layers) / len(layers)
        return per_sequence * self.sequences / (self.layout.tensor * self.layout.region)
