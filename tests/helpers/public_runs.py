"""Public training runs with every number that a plan needs: shapes, layouts, and the step time or memory published.

Models with a GELU MLP of width 4 C are written as SwiGLU of width 8/3 C, which has the same weights and operations.
What a source does not say, and is assumed here, stands in `assumed`. Rows are numbered as on docs/benchmarks/plan.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from biroute.configs.layout import Layout
from biroute.configs.load import config_from_tree
from biroute.configs.schema import RunConfig
from biroute.launcher.plan.hardware import GIB, load_hardware
from biroute.launcher.plan.prediction import Plan
from biroute.launcher.plan.workload import Execution, Workload

ALL_AXES = frozenset({"tensor", "pipeline", "data"})
MEGATRON_README = "README of NVIDIA/Megatron-LM, images/model_table.png"
LLAMA_3 = "Llama Team 2024 (arXiv:2407.21783), table 4"
MEGASCALE = "Jiang et al. 2024 (arXiv:2402.15627), tables 1 and 2"
KORTHIKANTI = "Korthikanti et al. 2022 (arXiv:2205.05198), as calculon-ai/calculon has it, calculon/llm/validation.py"
MT_NLG = "Smith et al. 2022 (arXiv:2201.11990), as cli99/llm-analysis has it, examples/megatron-turing-nlg"
TORCHTITAN = "pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md"


profile = cache(load_hardware)


@dataclass(frozen=True)
class Shape:
    """A dense transformer. Without `ffn` it has an MLP of width 4 C with GELU."""

    layers: int
    hidden: int
    heads: int
    vocab: int
    sequence: int
    kv_heads: int | None = None
    ffn: int | None = None

    @property
    def gated_ffn(self) -> int:
        return self.ffn or round(8 * self.hidden / 3)


@dataclass(frozen=True)
class PublicRun:
    """One published measurement."""

    row: str
    source: str
    shape: Shape
    hardware: str
    tensor: int
    pipeline: int
    data: int
    batch: int  # sequences of a step
    microbatch: int
    execution: Execution
    region: int = 1
    zero: int = 1
    sequence_parallel: bool = True
    step_seconds: float = 0.0
    memory_gib: float = 0.0
    assumed: str = ""

    @property
    def devices(self) -> int:
        return self.tensor * self.pipeline * self.data * self.region

    def config(self) -> RunConfig:
        shape = self.shape
        return config_from_tree(
            {
                "model": {
                    "num_layers": shape.layers, "hidden_size": shape.hidden, "num_heads": shape.heads,
                    "num_kv_heads": shape.kv_heads or shape.heads, "ffn_hidden_size": shape.gated_ffn,
                    "sequence_length": shape.sequence, "key_smear": False, "tied_embeddings": shape.kv_heads is None,
                    "attention": {"kind": "dense"},
                },
                "data": {"tokenizer": {"vocab_size": shape.vocab}},
                "parallel": {
                    "tensor": self.tensor, "pipeline": self.pipeline, "data": self.data, "region": self.region,
                    "sequence_parallel": self.sequence_parallel,
                },
                "train": {
                    "global_batch_size": self.batch, "microbatch_size": self.microbatch, "precision": "bf16",
                },
            },
            self.row,
        )  # fmt: skip

    def plan(self, efficiency: float | None = None) -> Plan:
        """The plan of the run; `efficiency` instead of the profile's, to fit it."""
        hardware = profile(self.hardware)
        if efficiency is not None:
            hardware = hardware.model_copy(update={"efficiency": efficiency})
        return Plan(work_of(self), hardware)

    @property
    def gpu(self) -> str:
        return self.hardware.split("-")[0]


@cache
def work_of(run: PublicRun) -> Workload:
    """What a rank of the run does; the same for every efficiency that is tried."""
    layout = Layout(run.tensor, run.region, run.data, run.pipeline, run.zero)
    return Workload(run.config(), layout, run.execution)


# Fused norms read and write each element once. Megatron's distributed optimizer: gradients scattered in fp32.
MEGATRON = Execution(
    recompute="none", hidden=frozenset(), state_bytes=(2, 4, 12), logit_bytes=6, reduction="reduce_scatter",
    norm_passes=4, scatters_sends=True, even_regions=True,
)  # fmt: skip


def megatron_readme() -> Iterator[PublicRun]:
    """Rows 1-9: GPT on H100, S 4096, vocabulary 131072, 48 data ranks; TFLOP/s by Megatron's rule."""
    for row, layers, hidden, heads, tensor, pipeline, batch, tflops in (
        (1, 24, 2048, 16, 1, 1, 192, 408.8), (2, 30, 4096, 32, 2, 1, 192, 465.9),
        (3, 32, 6144, 48, 4, 1, 192, 489.1), (4, 48, 7168, 56, 8, 1, 192, 459.6),
        (5, 84, 8192, 64, 8, 2, 384, 419.7), (6, 92, 10240, 80, 8, 4, 768, 420.5),
        (7, 96, 12288, 96, 8, 6, 1152, 432.8), (8, 96, 16384, 128, 8, 8, 1536, 474.4),
        (9, 112, 18432, 144, 8, 16, 3072, 459.9),
    ):  # fmt: skip
        shape = Shape(layers, hidden, heads, 131_072, 4096)
        # Narayanan et al. 2021 (arXiv:2104.04473), equation 3, without recomputation: attention counted whole.
        flops = 72 * batch * 4096 * layers * hidden**2
        flops *= 1 + 4096 / (6 * hidden) + 131_072 / (12 * hidden * layers)  # type: ignore[assignment]
        yield PublicRun(
            row=str(row), source=MEGATRON_README, shape=shape, hardware="h100", tensor=tensor, pipeline=pipeline,
            data=48, batch=batch, microbatch=4 if pipeline == 1 else 1,
            execution=replace(MEGATRON, hidden=ALL_AXES, virtual_stages=layers // pipeline if pipeline > 1 else 1),
            step_seconds=flops / (tensor * pipeline * 48) / (tflops * 1e12),
            assumed="microbatch 4" if pipeline == 1 else "microbatch 1, one layer per virtual stage",
        )  # fmt: skip


LLAMA_405B = Shape(126, 16384, 128, 128_256, 8192, kv_heads=8, ffn=53248)
LLAMA_8B = Shape(32, 4096, 32, 128_256, 8192, kv_heads=8, ffn=14336)
LLAMA_70B = Shape(80, 8192, 64, 128_256, 8192, kv_heads=8, ffn=28672)


def llama_3() -> Iterator[PublicRun]:
    """Rows 10-12: 405B. The paper gives TFLOP/s without its rule; half of the scores, as a causal model needs."""
    for row, region, data, batch, length, tflops in (
        (10, 1, 64, 2048, 8192, 430), (11, 1, 128, 2048, 8192, 400), (12, 16, 8, 128, 131_072, 380),
    ):  # fmt: skip
        run = PublicRun(
            row=str(row), source=LLAMA_3, shape=replace(LLAMA_405B, sequence=length), hardware="h100", tensor=8,
            pipeline=16, data=data, region=region, batch=batch, microbatch=1,
            execution=replace(MEGATRON, hidden=ALL_AXES, virtual_stages=8),
            assumed="microbatch 1, one layer per virtual stage, TFLOP/s of causal attention",
        )  # fmt: skip
        yield replace(run, step_seconds=run.plan().flops_per_step / run.devices / (tflops * 1e12))


def megascale() -> Iterator[PublicRun]:
    """Rows 13-17: 175B on A100. The paper adds hidden communication and FlashAttention-2 to Megatron-LM."""
    shape = Shape(96, 12288, 128, 64_000, 2048)
    for row, batch, devices, theirs, megatron in (
        ("13", 6144, 3072, 23.66, 29.02), ("14", 6144, 6144, 12.21, 14.78), ("15", 6144, 8192, 9.56, 12.24),
        ("16", 6144, 12288, 6.34, 8.57), ("17a", 768, 256, 32.0, 40.0), ("17b", 768, 512, 16.5, 21.2),
        ("17c", 768, 768, 11.5, 15.2), ("17d", 768, 1024, 8.9, 11.9),
    ):  # fmt: skip
        run = PublicRun(
            row=f"{row} MegaScale", source=MEGASCALE, shape=shape, hardware="a100", tensor=8, pipeline=8,
            data=devices // 64, batch=batch, microbatch=1, step_seconds=theirs,
            execution=replace(MEGATRON, hidden=ALL_AXES, virtual_stages=6), assumed="microbatch 1",
        )  # fmt: skip
        yield run
        yield replace(
            run, row=f"{row} Megatron-LM", step_seconds=megatron,
            execution=replace(MEGATRON, virtual_stages=6, keeps_scores=True),
            assumed="microbatch 1; nothing hidden and scores kept, as the paper's table 3 begins",
        )  # fmt: skip


def korthikanti() -> Iterator[PublicRun]:
    """Rows 18-21: GPT on A100, no data ranks; all recomputed, or sequence parallel with attention recomputed."""
    old = replace(MEGATRON, keeps_scores=True)
    for row, layers, hidden, heads, pipeline, batch, microbatch, parts, full, selective in (
        (18, 48, 6144, 64, 1, 4, 4, 1, 1.42, 1.10), (19, 96, 12288, 96, 8, 64, 1, 3, 18.13, 13.75),
        (20, 105, 20480, 128, 35, 280, 1, 3, 49.05, 37.83), (21, 128, 25600, 160, 64, 512, 1, 1, 94.42, 71.49),
    ):  # fmt: skip
        run = PublicRun(
            row=f"{row} full", source=KORTHIKANTI, shape=Shape(layers, hidden, heads, 51_200, 2048), hardware="a100",
            tensor=8, pipeline=pipeline, data=1, batch=batch, microbatch=microbatch, sequence_parallel=False,
            step_seconds=full, execution=replace(old, recompute="full", virtual_stages=parts),
        )  # fmt: skip
        yield run
        yield replace(
            run, row=f"{row} selective", step_seconds=selective, sequence_parallel=True,
            execution=replace(run.execution, recompute="selective"),
        )  # fmt: skip


def mt_nlg() -> Iterator[PublicRun]:
    """Row 22: 530B on A100 of 40 GB, with Megatron-LM and DeepSpeed."""
    for data, seconds in ((8, 60.1), (10, 50.2), (12, 44.4)):
        yield PublicRun(
            row=f"22, {data * 280} GPUs", source=MT_NLG, shape=Shape(105, 20480, 128, 50_272, 2048),
            hardware="a100-40", tensor=8, pipeline=35, data=data, batch=1920, microbatch=1, zero=0,
            sequence_parallel=False, step_seconds=seconds,
            execution=replace(
                MEGATRON, recompute="full", keeps_scores=True, reduction="all_reduce", reduction_bytes=2
            ),
            assumed="microbatch 1, every block recomputed, gradients summed in fp16",
        )  # fmt: skip


# FSDP: fp32 weights, gradients and moments, all divided; weights gathered in bf16. The loss in fp32 keeps the result
# of log-softmax and its two gradients. DTensors keep gathered inputs, the
# MLP also silu of the one half.
FSDP = Execution(
    recompute="alternate", hidden=frozenset({"data"}), state_bytes=(4, 4, 8), logit_bytes=12, norm_passes=4,
    even_regions=True, gathers="blocks", whole_inputs=True, mlp_tensors=4,
)  # fmt: skip
# Where the words are divided between tensor ranks, the loss is PyTorch's loss_parallel: its backward holds the result
# of log-softmax, its exponential, the gradient so far and their sum, all in fp32.
LOSS_PARALLEL_BYTES = 16


def memory_runs() -> Iterator[PublicRun]:
    """Rows 23-27: torchtitan on H100 of 96 GB, peak of the reserved memory."""
    base = PublicRun(
        row="23", source=TORCHTITAN, shape=LLAMA_8B, hardware="h100", tensor=1, pipeline=1, data=8, batch=16,
        microbatch=2, zero=3, execution=FSDP, memory_gib=82.4, assumed="S 8192",
    )  # fmt: skip
    yield base
    yield replace(base, row="24", data=128, batch=256, memory_gib=67.0)
    full = replace(FSDP, recompute="full")
    for region, length, gib in ((1, 32_768, 83.9), (2, 65_536, 84.2), (4, 131_072, 84.0), (8, 262_144, 84.5)):
        yield replace(
            base, row=f"25, S {length:,}", shape=replace(LLAMA_8B, sequence=length), region=region, data=8 // region,
            batch=8 // region, microbatch=1, execution=full, memory_gib=gib,
            assumed="float8 takes no memory of its own",
        )  # fmt: skip
    full = replace(full, logit_bytes=LOSS_PARALLEL_BYTES)
    yield replace(
        base, row="26", shape=LLAMA_70B, tensor=8, data=32, batch=512, microbatch=16,
        execution=full, memory_gib=71.9, assumed="S 8192; float8 takes no memory of its own",
    )  # fmt: skip
    # torchtitan's defaults with a pipeline: as many microbatches as stages, and weights stay gathered. The last stage
    # keeps its outputs, the logits in bf16, to give them back in one piece.
    pipelined = replace(
        base, shape=LLAMA_405B, tensor=8, pipeline=8, data=8, batch=256, microbatch=4,
        execution=replace(full, gathers="once", output_bytes=2),
        assumed="S 8192; eight microbatches and weights that stay gathered, torchtitan's defaults",
    )  # fmt: skip
    yield replace(pipelined, row="27, 1F1B", memory_gib=82.5)
    interleaved = replace(pipelined.execution, virtual_stages=2)
    yield replace(pipelined, row="27, interleaved", memory_gib=72.7, execution=interleaved)
    # Table 6 there: the same model and schedule with longer sequences. The formulas were complete before they were
    # compared with these four.
    for region, length, gib in ((1, 32_768, 75.3), (2, 65_536, 75.9), (4, 131_072, 77.1), (8, 262_144, 84.9)):
        yield replace(
            pipelined, row=f"27b, S {length:,}", shape=replace(LLAMA_405B, sequence=length), region=region,
            data=8 // region, batch=64 // region, microbatch=1, memory_gib=gib,
            assumed="eight microbatches and weights that stay gathered, torchtitan's defaults",
        )  # fmt: skip


TIMED = [*megatron_readme(), *llama_3(), *megascale(), *korthikanti(), *mt_nlg()]
MEASURED_MEMORY = list(memory_runs())


def time_error(run: PublicRun, efficiency: float | None = None) -> float:
    """Predicted over published step time, minus 1."""
    return run.plan(efficiency).step.total / run.step_seconds - 1


def memory_error(run: PublicRun) -> float:
    """Predicted over published memory, minus 1."""
    return run.plan().memory.total / GIB / run.memory_gib - 1


def fit_efficiency(runs: list[PublicRun]) -> float:
    """The one constant, to 0.005, with the smallest mean error over `runs`."""
    steps = [number / 200 for number in range(60, 200)]
    return min(steps, key=lambda e: sum(abs(time_error(run, e)) for run in runs))
