"""The configuration of a run: typed, frozen, each field described once. The reference in docs is made from here.

Sizes that follow from others are properties, never a second field.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class AttentionConfig(Section):
    """Which tokens a token may look at. The algorithm is described in docs/architecture.md."""

    kind: Literal["bi_level", "dense", "sliding_window"] = Field(
        "bi_level",
        description="bi_level: routed regions; dense: all; sliding_window: the own region and topk - 1 near ones",
    )
    region_size: PositiveInt = Field(16, description="tokens per region (L)")
    query_block_size: PositiveInt = Field(1, description="tokens that share one route (Lq), divides region_size")
    topk: PositiveInt = Field(8, description="regions that a query block attends to (k), the forced ones included")
    descriptor: Literal["pre_rope", "post_rope"] = Field(
        "pre_rope", description="take region descriptors before or after the rotary embedding"
    )
    descriptors_per_region: PositiveInt = Field(
        default_factory=lambda above: math.gcd(8, above["region_size"]),
        description="descriptors of a region, each the mean of as many consecutive keys; the nearest one counts. "
        "More find more in large regions and cost routing in proportion; left out: gcd(8, region_size)",
    )
    force_own: bool = Field(True, description="always route to the own region; may be off only with objective=mlm")
    force_previous: bool = Field(True, description="always route to the region before the own one")
    attention_sink: bool = Field(False, description="always route to region 0")
    router: Literal["affinity", "random"] = Field(
        "affinity", description="random is a diagnostic: a router that does not beat it is dead"
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

    hidden_size: PositiveInt = Field(256, description="width of the residual stream")
    num_layers: PositiveInt = Field(4, description="transformer blocks")
    num_heads: PositiveInt = Field(8, description="query heads (H)")
    num_kv_heads: PositiveInt = Field(2, description="key/value groups (G); equal to num_heads: no grouping")
    head_size: PositiveInt = Field(
        default_factory=lambda above: above["hidden_size"] // above["num_heads"],
        description="elements of a head (D); left out: hidden_size / num_heads",
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
    mask_fraction: Fraction = Field(0.15, description="fraction of the tokens that objective=mlm hides")
    qk_norm: bool = Field(False, description="RMSNorm on the queries and keys of each head")
    key_smear: bool = Field(
        True,
        description="add a learned fraction of the key before to each key, element by element (at first 0.5), in all "
        "layers: what followed a token is then found by one layer, and routed to",
    )
    tied_embeddings: bool = Field(True, description="the head uses the embedding's weight")
    rope_base: float = Field(10_000.0, gt=1.0, description="base of the rotary embedding's wavelengths")
    norm_epsilon: float = Field(1e-5, gt=0.0, description="epsilon of RMSNorm")
    init_std: float = Field(0.02, gt=0.0, description="standard deviation of the initial weights")
    dense_layers: tuple[int, ...] = Field(
        (), description="layers (from 0) whose attention is dense whatever kind says"
    )
    sliding_window_layers: tuple[int, ...] = Field(
        (), description="layers (from 0) whose attention is sliding_window whatever kind says"
    )
    attention: AttentionConfig = Field(AttentionConfig(), description="attention of the other layers")

    @property
    def num_regions(self) -> int:
        """R, regions of a sequence."""
        return self.sequence_length // self.attention.region_size

    @property
    def causal(self) -> bool:
        return self.objective == "causal"

    def attention_kind(self, layer: int) -> str:
        """`bi_level`, `dense` or `sliding_window` for block `layer`, counted from 0."""
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
            raise ValueError(f"head_size={self.head_size} is odd; the rotary embedding turns pairs, use an even size")
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
                f"layers {both} are in dense_layers and in sliding_window_layers; name each in one of them"
            )
        if self.objective == "mlm" and not 1 <= self.masked_tokens < self.sequence_length:
            raise ValueError(f"mask_fraction={self.mask_fraction} masks {self.masked_tokens} tokens of a sequence")
        return self

    @property
    def masked_tokens(self) -> int:
        """Tokens that objective=mlm hides in each sequence: a fixed number, so that means are exact."""
        return round(self.mask_fraction * self.sequence_length)


class ParallelConfig(Section):
    """The layout: sizes of the four mesh axes and the ZeRO stage."""

    tensor: PositiveInt = Field(1, description="ranks that share each weight matrix")
    pipeline: PositiveInt = Field(1, description="stages that share the layers")
    region: PositiveInt = Field(1, description="ranks that share the regions of a sequence")
    region_exchange: Literal["auto", "fetch", "ship"] = Field(
        "auto",
        description="how region ranks get at each other's regions: fetch keys and values, ship queries, or auto: "
        "whichever moves fewer bytes, pair by pair",
    )
    sequence_parallel: bool = Field(
        False,
        description="tensor ranks also share the tokens of norms and residuals (Megatron's sequence parallelism); "
        "no effect with tensor=1",
    )
    data: PositiveInt | None = Field(None, description="replicas of the model; empty: what the processes leave")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="DeepSpeed ZeRO: 1 shards optimizer state, 2 also gradients, 3 also parameters"
    )

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.pipeline > 1 and self.zero_stage > 1:
            raise ValueError(
                f"pipeline={self.pipeline} with zero_stage={self.zero_stage}: DeepSpeed pipelines support "
                "ZeRO 0 and 1 only; set zero_stage=1 or pipeline=1"
            )
        return self


class SourceConfig(Section):
    """One source of documents."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="name in the manifest and in metrics")
    paths: tuple[str, ...] = Field(
        min_length=1, description="files or globs: .txt (one document a file), .jsonl; each also .gz or .zst"
    )
    weight: float | None = Field(
        None, gt=0, description="weight in training, relative; empty: by its number of tokens"
    )
    text_field: str = Field("text", description="field of a .jsonl line that holds the document")


class TokenizerConfig(Section):
    """The SentencePiece model: trained on the sources, or given."""

    model_path: Path | None = Field(None, description="a SentencePiece model to use; empty: train one")
    kind: Literal["bpe", "unigram"] = Field("bpe", description="how to train; unigram takes about 25 times as long")
    vocab_size: int = Field(8192, ge=300, description="pieces, the 256 byte pieces and the special ones included")
    character_coverage: float = Field(
        0.985,
        ge=0.98,  # below, SentencePiece refuses
        le=1.0,
        description="fraction of the characters with a piece of their own; the rest goes to bytes",
    )
    training_bytes: PositiveInt = Field(20_000_000, description="bytes of text to train on, drawn over all sources")


class DataConfig(Section):
    """From raw text to the order of training sequences."""

    dir: Path = Field(Path("data/dataset"), description="folder of the built dataset")
    sources: tuple[SourceConfig, ...] = Field((), description="where the documents come from")
    tokenizer: TokenizerConfig = Field(TokenizerConfig(), description="the tokenizer")
    heldout_fraction: Fraction = Field(0.01, description="fraction of the documents kept out of training")
    min_document_bytes: PositiveInt = Field(1, description="shorter documents are skipped and counted")
    max_document_bytes: int = Field(1_000_000, ge=16, description="longer documents are cut into parts of this size")
    tokens_per_sample: PositiveInt = Field(65_536, description="tokens in one WebDataset sample")
    samples_per_shard: PositiveInt = Field(64, description="WebDataset samples in one shard")
    workers: int = Field(0, ge=0, description="tokenising processes; 0: one per core")
    seed: int = Field(0, description="seed of the order of training; the held-out split does not depend on it")

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"sources named twice: {', '.join(twice)}; give each source its own name")
        if len({source.weight is None for source in self.sources}) > 1:
            raise ValueError("some sources have a weight and some do not; give one to all or to none")
        return self


class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    learning_rate: float = Field(3e-4, gt=0, description="peak learning rate")
    min_learning_rate: float = Field(3e-5, ge=0, description="learning rate at the last step")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine",
        description="after the warm-up: cosine decay; wsd: constant, then linear decay over decay_steps",
    )
    warmup_steps: int = Field(100, ge=0, description="steps of linear warm-up")
    decay_steps: int = Field(0, ge=0, description="steps of the final decay of wsd")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay of the matrices")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of AdamW's first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of AdamW's second moment")
    epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    gradient_clip: float = Field(1.0, ge=0, description="largest norm of the whole gradient; 0: no clipping")

    @model_validator(mode="after")
    def _check(self) -> OptimConfig:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate={self.min_learning_rate} is above learning_rate={self.learning_rate}"
            )
        if self.schedule == "wsd" and self.decay_steps == 0:
            raise ValueError("schedule=wsd needs decay_steps of at least 1")
        return self


class TrainConfig(Section):
    """Length, batch, precision and intervals of a run."""

    run_dir: Path = Field(Path("runs/default"), description="folder of the run: config, logs, checkpoints, metrics")
    steps: PositiveInt = Field(1000, description="optimizer steps")
    global_batch_size: PositiveInt = Field(16, description="sequences per step, over all ranks")
    microbatch_size: PositiveInt = Field(4, description="sequences per data rank and forward pass")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16 keeps fp32 master weights and accumulates gradients in fp32"
    )
    activation_checkpointing: bool = Field(
        False, description="recompute activations of each block in backward to save memory"
    )
    seed: int = Field(0, description="seed of the initial weights and of masking")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    threads_per_rank: int = Field(
        0, ge=0, description="CPU threads of each rank; 0: OMP_NUM_THREADS, or the cores divided by the ranks"
    )
    log_every: PositiveInt = Field(10, description="steps between log lines and metric points")
    evaluate_every: int = Field(
        200, ge=0, description="steps between held-out evaluations; 0: only after the last step"
    )
    evaluate_sequences: PositiveInt = Field(64, description="held-out sequences per evaluation, over all ranks")
    hang_seconds: float = Field(
        900.0,
        ge=0,
        description="longest time without a step, an evaluation batch or a part of a save; then the attempt ends; "
        "0: never",
    )
    startup_seconds: float = Field(
        1800.0, gt=0, description="the same for everything up to the end of an attempt's first step"
    )


class CheckpointConfig(Section):
    """When to save and what to keep. Checkpoints lie in run_dir/checkpoints."""

    every_steps: int = Field(200, ge=0, description="steps between checkpoints; 0: only at the end and on a signal")
    keep: PositiveInt = Field(2, description="newest checkpoints kept; older ones are removed")


class TrackingConfig(Section):
    """MLflow."""

    enabled: bool = Field(True, description="send metrics to MLflow; the metrics log on disk is written in any case")
    uri: str = Field("", description="MLflow tracking URI; empty: sqlite file mlflow.db beside the run folder")
    experiment: str = Field("biroute", min_length=1, description="MLflow experiment")
    run_name: str = Field("", description="MLflow run name; empty: the name of the run folder")
    timeout_seconds: float = Field(5.0, gt=0, description="longest wait for one call to the MLflow server")
    flush_seconds: float = Field(30.0, ge=0, description="longest wait at the end for metrics not yet sent")


_SLURM_TIME = r"\d+|\d+:\d\d?|\d+:\d\d?:\d\d?|\d+-\d+(:\d\d?){0,2}|UNLIMITED|INFINITE"


def _check_slurm_time(value: object) -> str:
    text = str(value) if type(value) is int else value
    if not isinstance(text, str) or not re.fullmatch(_SLURM_TIME, text):
        raise ValueError("not a time that Slurm knows; use minutes, hours:minutes:seconds or days-hours")
    return text


SlurmTime = Annotated[str, BeforeValidator(_check_slurm_time)]


class SlurmConfig(Section):
    """How `biroute submit` asks a Slurm cluster for a run. What holds for a whole cluster is in its profile."""

    profile: str | None = Field(
        None, description="cluster profile: a YAML file, or the name of one that ships; `biroute submit` needs it"
    )
    nodes: PositiveInt = Field(1, description="nodes to train on")
    ranks_per_node: PositiveInt | None = Field(
        None,
        description="ranks on each node; empty: the profile's GPUs per node, or the layout's divided by the nodes",
    )
    time_limit: SlurmTime | None = Field(
        None, description="limit of one job, as sbatch takes it (24:00:00, 2-0, minutes); empty: the profile's"
    )
    signal_seconds: int = Field(
        120, ge=10, description="seconds before the limit at which to save and stop; Slurm may be a minute early"
    )
    requeue: bool = Field(True, description="queue the job again after a stop, a crash or the loss of a node")
    max_restarts: int = Field(20, ge=0, description="times that a job is queued again after crashes and hangs")
    max_crashes_at_same_step: PositiveInt = Field(
        3, description="crashes of a job after the same step that end it, as one more would not help"
    )
    preflight_timeout_seconds: float = Field(
        300.0, gt=0, description="longest time for the check of all nodes before training"
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
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step trains on, over all ranks."""
        return self.train.global_batch_size * self.model.sequence_length

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the same in every layout, so that checkpoints outlive one."""
        multiple = self.model.vocab_multiple
        return -(-self.data.tokenizer.vocab_size // multiple) * multiple
