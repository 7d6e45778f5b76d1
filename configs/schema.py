"""The configuration of a run, typed and immutable. docs/configuration.md is generated from the descriptions here.

Sizes that follow from others are properties, never fields of their own.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from biroute.configs.data_section import DataConfig
from biroute.configs.optim_section import OptimConfig
from biroute.configs.section import IDENTITY, RECIPE, Fraction, OnResume, Section, fields_on_resume
from biroute.configs.slurm_section import SlurmConfig
from biroute.configs.tracking_section import TrackingConfig

DATASET = "data"  # stands, in `train.accept_changes`, for everything that a dataset was built with


class AttentionConfig(Section):
    """Which tokens a token attends to. The algorithm is described in docs/architecture.md."""

    on_resume: ClassVar[OnResume] = "identity"

    kind: Literal["bi_level", "dense", "sliding_window"] = Field(
        "bi_level",
        description="bi_level: routed regions; dense: all tokens; sliding_window: the topk nearest regions",
    )
    region_size: PositiveInt = Field(16, description="tokens per region (L)")
    query_block_size: PositiveInt = Field(1, description="tokens that share one route (Lq); divides region_size")
    topk: PositiveInt = Field(8, description="regions that a query block attends to (k), including the forced ones")
    descriptor: Literal["pre_rope", "post_rope"] = Field(
        "pre_rope", description="compute region descriptors from keys before or after the rotary embedding"
    )
    descriptors_per_region: PositiveInt = Field(
        default_factory=lambda above: math.gcd(8, above["region_size"]),
        description="descriptors per region, each the mean of an equal number of consecutive keys; the best match "
        "counts. More descriptors find more in large regions, and the cost of routing grows in proportion; left out: "
        "gcd(8, region_size)",
    )
    force_own: bool = Field(True, description="always route to the own region; may be false only with objective=mlm")
    force_previous: bool = Field(True, description="always route to the region before the own one")
    attention_sink: bool = Field(False, description="always route to region 0")
    router: Literal["affinity", "random"] = Field(
        "affinity", description="affinity: the best matches; random: a diagnostic baseline that a router must beat"
    )

    @model_validator(mode="after")
    def _check(self) -> AttentionConfig:
        for name in ("query_block_size", "descriptors_per_region"):
            if self.region_size % getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)} does not divide region_size={self.region_size}; "
                    f"use a divisor of {self.region_size}"
                )
        forced = self.force_own + self.force_previous + self.attention_sink
        if self.kind == "bi_level" and self.topk < forced:
            raise ValueError(
                f"topk={self.topk} leaves no room for the {forced} forced regions; raise topk to at least {forced}"
            )
        return self


class ModelConfig(Section):
    """The transformer: embedding, blocks (RMSNorm, attention with RoPE, SwiGLU), norm, head."""

    on_resume: ClassVar[OnResume] = "identity"

    hidden_size: PositiveInt = Field(256, description="width of the residual stream")
    num_layers: PositiveInt = Field(4, le=10_000, description="transformer blocks")
    num_heads: PositiveInt = Field(8, description="query heads (H)")
    num_kv_heads: PositiveInt = Field(2, description="key/value heads (G); equal to num_heads: no grouping")
    head_size: PositiveInt = Field(
        default_factory=lambda above: above["hidden_size"] // above["num_heads"],
        description="width of a head (D); left out: hidden_size / num_heads",
    )
    ffn_hidden_size: PositiveInt = Field(
        default_factory=lambda above: -(-8 * above["hidden_size"] // (3 * 64)) * 64,
        description="inner width of SwiGLU; left out: 8/3 hidden_size, rounded up to a multiple of 64",
    )
    sequence_length: PositiveInt = Field(1024, description="tokens per sequence (S)")
    vocab_multiple: PositiveInt = Field(128, description="the vocabulary is padded up to a multiple of this")
    objective: Literal["causal", "mlm"] = Field(
        "causal",
        description="causal: predict the next token; mlm: bidirectional, predict masked tokens",
    )
    mask_fraction: Fraction = Field(0.15, description="fraction of the tokens that objective=mlm masks")
    qk_norm: bool = Field(False, description="RMSNorm on the queries and keys of each head")
    key_smear: bool = Field(
        True,
        description="in all layers, add to each key a learned fraction of the preceding key, element by element "
        "(initially 0.5): a single layer then finds, and routes to, what followed a token",
    )
    tied_embeddings: bool = Field(True, description="use the embedding's weight in the LM head")
    rope_base: float = Field(10_000.0, gt=1.0, description="base of the rotary embedding's wavelengths")
    norm_epsilon: float = Field(1e-5, gt=0.0, description="epsilon of RMSNorm")
    init_std: float = Field(
        0.02,
        gt=0.0,
        description="standard deviation of the initial weights; of the matrices that add to "
        "the residual stream: this divided by sqrt(2 num_layers)",
    )
    dense_layers: tuple[int, ...] = Field(
        (), description="layers (counted from 0) with dense attention, whatever attention.kind is"
    )
    sliding_window_layers: tuple[int, ...] = Field(
        (), description="layers (counted from 0) with sliding_window attention, whatever attention.kind is"
    )
    attention: AttentionConfig = Field(AttentionConfig(), description="attention of the other layers")

    @property
    def num_regions(self) -> int:
        """Number of regions of a sequence (R)."""
        return self.sequence_length // self.attention.region_size

    @property
    def causal(self) -> bool:
        return self.objective == "causal"

    def attention_kind(self, layer: int) -> str:
        """Return `bi_level`, `dense` or `sliding_window` for a layer, counted from 0."""
        if layer in self.dense_layers:
            return "dense"
        return "sliding_window" if layer in self.sliding_window_layers else self.attention.kind

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}")
        if "head_size" not in self.model_fields_set and self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}; set head_size yourself"
            )
        if self.head_size % 2:
            raise ValueError(f"head_size={self.head_size} is odd; the rotary embedding needs pairs, use an even size")
        if self.sequence_length % self.attention.region_size:
            raise ValueError(
                f"sequence_length={self.sequence_length} is not a multiple of "
                f"attention.region_size={self.attention.region_size}"
            )
        if self.causal and not self.attention.force_own:
            raise ValueError("attention.force_own=false needs objective=mlm: a causal token must see itself")
        for name, layers in (
            ("dense_layers", self.dense_layers),
            ("sliding_window_layers", self.sliding_window_layers),
        ):
            wrong = [layer for layer in layers if not 0 <= layer < self.num_layers]
            if wrong:
                raise ValueError(f"{name}={wrong} out of range; layers are 0 ... {self.num_layers - 1}")
        both = sorted({*self.dense_layers} & {*self.sliding_window_layers})
        if both:
            raise ValueError(
                f"layers {both} are both in dense_layers and in sliding_window_layers; name each in only one of them"
            )
        if self.objective == "mlm" and not 1 <= self.masked_tokens < self.sequence_length:
            raise ValueError(f"mask_fraction={self.mask_fraction} masks {self.masked_tokens} tokens of a sequence")
        return self

    @property
    def masked_tokens(self) -> int:
        """Tokens that objective=mlm masks in each sequence: a fixed number, so that means are exact."""
        return round(self.mask_fraction * self.sequence_length)


class ParallelConfig(Section):
    """The layout: sizes of the four mesh axes and the ZeRO stage."""

    tensor: PositiveInt = Field(1, description="tensor parallelism: ranks that each weight matrix is split over")
    pipeline: PositiveInt = Field(1, description="pipeline parallelism: stages that the layers are split over")
    region: PositiveInt = Field(1, description="context parallelism: ranks that a sequence's regions are split over")
    region_exchange: Literal["auto", "fetch", "ship"] = Field(
        "auto",
        description="how region ranks attend to each other's regions: fetch keys and values, ship queries, or auto: "
        "for each pair of ranks whichever moves fewer bytes",
    )
    sequence_parallel: bool = Field(
        False,
        description="also split the tokens of norms and residuals over the tensor ranks (Megatron's sequence "
        "parallelism); no effect with tensor=1",
    )
    data: PositiveInt | None = Field(
        None, description="replicas of the model; empty: the number of processes divided by the other axes"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="DeepSpeed ZeRO: 1 shards the optimizer state, 2 also the gradients, 3 also the parameters"
    )
    overlap_grad_reduce: bool = Field(
        False,
        description="with ZeRO 2 on GPUs, sum gradients over data ranks beside backward (DeepSpeed's overlap_comm), "
        "for a second buffer of 1 GB; ZeRO 3 always does, ZeRO 0 and 1 cannot",
    )

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.overlap_grad_reduce and self.zero_stage < 2:
            raise ValueError(
                f"overlap_grad_reduce=true with zero_stage={self.zero_stage}: DeepSpeed sums gradients there after "
                "backward; set zero_stage=2 or overlap_grad_reduce=false"
            )
        if self.pipeline > 1 and self.zero_stage > 1:
            raise ValueError(
                f"pipeline={self.pipeline} with zero_stage={self.zero_stage}: DeepSpeed pipelines support "
                "ZeRO 0 and 1 only; set zero_stage=1 or pipeline=1"
            )
        return self


class TrainConfig(Section):
    """Length, batch, precision and intervals of a run."""

    run_dir: Path = Field(Path("runs/default"), description="folder of the run: config, logs, checkpoints, metrics")
    steps: PositiveInt = Field(1000, description="optimizer steps", json_schema_extra=RECIPE)
    global_batch_size: PositiveInt = Field(
        16, description="sequences per step, over all ranks", json_schema_extra=RECIPE
    )
    microbatch_size: PositiveInt = Field(4, description="sequences per data rank and forward pass")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="precision of training; bf16 keeps fp32 master weights and accumulates gradients in fp32",
        json_schema_extra=RECIPE,
    )
    exact_sums: bool = Field(
        False,
        description="on CPUs in fp32: sum matrix products and attention in fp64 and round once; training then has, "
        "to the bit, the routes and logits of `biroute generate`, for about three quarters more time",
        json_schema_extra=RECIPE,
    )
    activation_checkpointing: bool = Field(
        False, description="recompute the activations of each block in the backward pass to save memory"
    )
    seed: int = Field(
        0, ge=0, lt=2**46, description="seed of the initial weights and of masking", json_schema_extra=IDENTITY
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda if there is a GPU, else cpu")
    threads_per_rank: int = Field(
        0, ge=0, description="CPU threads per rank; 0: OMP_NUM_THREADS, or the cores divided by the ranks"
    )
    accept_changes: tuple[str, ...] = Field(
        (),
        description="fields, such as model.rope_base, that may differ from the checkpoint that the run resumes from",
    )
    log_every: PositiveInt = Field(10, description="steps between log lines and metric points")
    hardware: str = Field(
        "",
        description="hardware profile whose peak rate throughput/mfu is relative to: a name as in biroute plan "
        "--hardware, or a YAML file; empty: no MFU",
    )
    route_metrics_every: int = Field(
        10,
        ge=0,
        description="log points between samples of routing health (the first and the last log point are always "
        "sampled); 0: none",
    )
    evaluate_every: int = Field(
        200, ge=0, description="steps between held-out evaluations; 0: only after the last step"
    )
    evaluate_sequences: PositiveInt | None = Field(
        None,
        description="held-out sequences per evaluation, over all ranks; left out: 64, or as many as there are",
        json_schema_extra=RECIPE,
    )
    hang_seconds: float = Field(
        900.0,
        ge=0,
        description="end the attempt after this time without a step, evaluation batch or part of a save; 0: never",
    )
    startup_seconds: float = Field(
        1800.0, gt=0, description="as hang_seconds, for everything up to the end of an attempt's first step"
    )


class CheckpointConfig(Section):
    """When to save and how many checkpoints to keep. They are stored in run_dir/checkpoints."""

    every_steps: int = Field(200, ge=0, description="steps between checkpoints; 0: only at the end and on a signal")
    keep: PositiveInt = Field(2, description="number of checkpoints to keep; older ones are removed")
    keep_every: int = Field(
        0, ge=0, description="keep one in this many of the checkpoints due after every_steps for ever; 0: none"
    )


class RunConfig(Section):
    """Everything that a run depends on."""

    model: ModelConfig = Field(ModelConfig(), description="the transformer")
    parallel: ParallelConfig = Field(ParallelConfig(), description="the layout")
    data: DataConfig = Field(DataConfig(), description="the data")
    optim: OptimConfig = Field(OptimConfig(), description="the optimizer")
    train: TrainConfig = Field(TrainConfig(), description="the run")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="saving")
    tracking: TrackingConfig = Field(TrackingConfig(), description="MLflow")
    slurm: SlurmConfig = Field(SlurmConfig(), description="Slurm")

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.train.precision == "bf16" and self.parallel.zero_stage == 0:
            raise ValueError(
                "train.precision=bf16 with parallel.zero_stage=0: DeepSpeed keeps fp32 master weights only from "
                "ZeRO 1 on; set parallel.zero_stage=1 (with one data rank it shards nothing)"
            )
        if self.train.exact_sums:
            for field, value in (
                ("parallel.region", self.parallel.region if self.parallel.region > 1 else None),
                ("train.precision", self.train.precision if self.train.precision != "fp32" else None),
                ("train.device", self.train.device if self.train.device == "cuda" else None),
            ):
                if value is not None:
                    raise ValueError(
                        f"train.exact_sums with {field}={value}: it is for CPUs in fp32 that hold whole "
                        f"sequences; leave {field} or train.exact_sums out"
                    )
        refusable = {name for name, kind in fields_on_resume(RunConfig) if kind == "identity"} | {DATASET}
        wrong = [name for name in self.train.accept_changes if name not in refusable]
        if wrong:
            raise ValueError(
                f"train.accept_changes={wrong[0]}: not a field that a resume refuses to change; those "
                f"are marked as identity in docs/configuration.md, and {DATASET} stands for the dataset"
            )
        optim, steps = self.optim, self.train.steps
        warmup_steps = optim.warmup_of(steps)
        if 0 < warmup_steps >= steps:
            raise ValueError(
                f"optim.warmup_steps={warmup_steps} is not below train.steps={steps}, so the learning rate would "
                "never get past its warm-up; lower it, or leave it out"
            )
        if optim.schedule == "wsd" and warmup_steps + optim.decay_steps > steps:
            raise ValueError(
                f"optim.warmup_steps={warmup_steps} and optim.decay_steps={optim.decay_steps} together exceed "
                f"train.steps={steps}, so the learning rate would jump; lower one of them"
            )
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step trains on, over all ranks."""
        return self.train.global_batch_size * self.model.sequence_length

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding, equal in every layout, so that a checkpoint can be loaded in another layout."""
        multiple = self.model.vocab_multiple
        return -(-self.data.tokenizer.vocab_size // multiple) * multiple
