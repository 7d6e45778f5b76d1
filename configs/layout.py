"""Layout: the sizes of the four mesh axes, and the check that a configuration fits them. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from biroute.configs.errors import UsageError
from biroute.configs.schema import RunConfig


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes. The tensor rank varies fastest, then region, data, pipe (Megatron's tp-cp-dp-pp)."""

    tensor: int
    region: int
    data: int
    pipe: int
    zero_stage: int

    @property
    def world_size(self) -> int:
        return self.tensor * self.region * self.data * self.pipe

    def __str__(self) -> str:
        return f"tensor={self.tensor} region={self.region} data={self.data} pipe={self.pipe} zero={self.zero_stage}"


def default_world_size(config: RunConfig) -> int:
    """Return the number of processes that the configuration needs; data counts as 1 if it is left out."""
    parallel = config.parallel
    return parallel.tensor * parallel.region * parallel.pipeline * (parallel.data or 1)


def resolve_layout(config: RunConfig, world_size: int) -> Layout:
    """Resolve the layout of `config` on `world_size` processes.

    Raises:
        UsageError: an axis does not divide what it splits, or the product of the axes is not `world_size`.
    """
    parallel = config.parallel
    model_size = parallel.tensor * parallel.region * parallel.pipeline
    if parallel.data is None and world_size % model_size:
        raise UsageError(
            f"parallel.tensor x region x pipeline = {parallel.tensor} x {parallel.region} x {parallel.pipeline} "
            f"= {model_size} does not divide the {world_size} processes; start a multiple of {model_size}"
        )
    data = parallel.data or world_size // model_size
    if data * model_size != world_size:
        raise UsageError(
            f"the layout tensor x region x pipeline x data = {parallel.tensor} x {parallel.region} x "
            f"{parallel.pipeline} x {data} needs {data * model_size} processes, but {world_size} were started; "
            f"start {data * model_size}, or leave parallel.data out"
        )
    layout = Layout(parallel.tensor, parallel.region, data, parallel.pipeline, parallel.zero_stage)
    _check_model(config, layout)
    _check_batch(config, layout)
    return layout


def microbatches_per_step(config: RunConfig, layout: Layout) -> int:
    """Return the number of forward passes of one data rank in one optimizer step (gradient accumulation)."""
    return config.train.global_batch_size // (config.train.microbatch_size * layout.data)


def _check_model(config: RunConfig, layout: Layout) -> None:
    model = config.model
    if layout.region > model.num_regions:
        raise UsageError(
            f"parallel.region={layout.region}: a sequence has only {model.num_regions} regions "
            f"(model.sequence_length={model.sequence_length}, model.attention.region_size="
            f"{model.attention.region_size}); use at most {model.num_regions} region ranks"
        )
    tokens_per_rank = model.sequence_length // layout.region
    if config.parallel.sequence_parallel and tokens_per_rank % layout.tensor:
        raise UsageError(
            f"parallel.tensor={layout.tensor} does not divide the {tokens_per_rank} tokens of a region rank "
            f"(model.sequence_length={model.sequence_length}, parallel.region={layout.region}); change one of them, "
            "or set parallel.sequence_parallel=false"
        )
    shared = [
        ("parallel.tensor", layout.tensor, "model.num_heads", model.num_heads),
        ("parallel.tensor", layout.tensor, "model.num_kv_heads", model.num_kv_heads),
        ("parallel.tensor", layout.tensor, "model.ffn_hidden_size", model.ffn_hidden_size),
        ("parallel.tensor", layout.tensor, "the padded vocabulary", config.padded_vocab_size),
        ("parallel.pipeline", layout.pipe, "model.num_layers", model.num_layers),
        ("parallel.region", layout.region, "the regions of a sequence", model.num_regions),
    ]
    for axis, size, what, amount in shared:
        if amount % size:
            divisors = [n for n in range(1, min(amount, 64) + 1) if amount % n == 0]
            raise UsageError(
                f"{axis}={size} does not divide {what} ({amount}); use one of {', '.join(map(str, divisors))}"
            )


def _check_batch(config: RunConfig, layout: Layout) -> None:
    per_pass = config.train.microbatch_size * layout.data
    for field, sequences in (
        ("train.global_batch_size", config.train.global_batch_size),
        ("train.evaluate_sequences", config.train.evaluate_sequences),
    ):
        if sequences is not None and sequences % per_pass:
            raise UsageError(
                f"{field}={sequences} is not a multiple of train.microbatch_size x data ranks = "
                f"{config.train.microbatch_size} x {layout.data} = {per_pass}; use a multiple of {per_pass}"
            )
