"""Time of an optimizer step, part by part: operations, bytes of memory and bytes between ranks, each at its rate.

Matrix products and attention run at the device's peak times ONE constant, its efficiency; everything else at the
rates of the data sheets. Parts of one rank follow one another, except what `Execution.hidden` names: that lasts only
as long as it outlasts the computation beside it.

Source: Williams et al. 2009, Roofline, for operations and bytes; Narayanan et al. 2021 (arXiv:2104.04473), section
2.2, for the bubble of 1F1B, (p - 1) / m of the time of a step's microbatches, divided by the virtual stages.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from biroute.launcher.plan.communication import Axis, Traffic, traffic
from biroute.launcher.plan.cpu_time import attention_time, busy_factor
from biroute.launcher.plan.hardware import HardwareProfile
from biroute.launcher.plan.workload import Workload

# Bytes of a step of AdamW for each parameter, fp32: gradient, master weight and two moments read, the last three
# written; besides, the weight.
OPTIMIZER_BYTES = 28.0
SCORE_PASSES = 6  # times that a score is read or written forward: product, softmax, dropout, product


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the critical path, by part."""

    matmul: float  # matrix products of the blocks
    attention: float
    routing: float
    head: float  # LM head and loss
    elementwise: float  # norms, residuals, rotary embedding, activation function: bound by memory
    recomputation: float
    tensor: float  # communication that is not hidden, by axis
    region: float
    pipeline: float
    data: float
    optimizer: float
    bubble: float  # of the pipeline

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Return the parts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


# Part of the step -> what it waits for.
RESOURCES = {
    "matrix units": ("matmul", "attention", "routing", "head", "recomputation"),
    "memory bandwidth": ("elementwise", "optimizer"),
    "links of the tensor axis": ("tensor",),
    "links of the region axis": ("region",),
    "links of the pipeline axis": ("pipeline",),
    "links of the data axis": ("data",),
    "pipeline bubble": ("bubble",),
}


def binding_resource(step: StepTime) -> tuple[str, float]:
    """Return what most of the step waits for, and the share of the step."""
    parts = step.parts()
    shares = {name: sum(parts[part] for part in of) / step.total for name, of in RESOURCES.items()}
    name = max(shares, key=lambda one: shares[one])
    return name, shares[name]


def step_time(work: Workload, hardware: HardwareProfile, exchange_fraction: float) -> StepTime:
    """Predict the time of a step.

    Args:
        work: configuration, layout and execution.
        hardware: rates of the device and its links.
        exchange_fraction: of the bound, what routed layers exchange between region ranks.
    """
    stages, layers = work.layout.pipe, work.layers_of_stage
    # The stage that takes longest sets the pace; the last one has the head, so it is compared with the longest other.
    first_longest = layers.index(max(layers))
    longest = _stage_time(work, hardware, first_longest, exchange_fraction)
    if stages == 1:
        return longest
    last = longest if first_longest == stages - 1 else _stage_time(work, hardware, stages - 1, exchange_fraction)
    slowest = max(longest, last, key=lambda step: step.total)
    # An idle rank waits for the other stages' share of a microbatch, head included where it is.
    head = last.head / work.microbatches / stages
    busy = longest.total - longest.optimizer - longest.data - longest.head
    busy *= work.config.model.num_layers / stages / max(layers)
    bubble = (stages - 1) / work.execution.virtual_stages * (busy / work.microbatches + head)
    return StepTime(**{**slowest.parts(), "bubble": bubble})


def _stage_time(work: Workload, hardware: HardwareProfile, stage: int, exchange_fraction: float) -> StepTime:
    """Return the time of one stage's own work in a step, without the bubble."""
    execution, batches = work.execution, work.microbatches
    blocks = batches * work.layers_of_stage[stage]
    matmul, elementwise = blocks * _matmul(work, hardware), blocks * _elementwise(work, hardware)
    attention, attention_backward, routing = _attention(work, hardware, stage)
    scores = blocks * _score_traffic(work, hardware)
    sent = traffic(work, stage, exchange_fraction)
    seconds = {axis: _seconds(work, hardware, sent, axis) for axis in ("tensor", "region", "pipeline", "data")}
    again = {
        "none": 0.0,
        "selective": attention + scores,
        "alternate": matmul / 2 + elementwise,
        "full": matmul + attention + routing + elementwise + scores,
    }[execution.recompute]
    computing = {
        "tensor": 3 * matmul,
        "region": attention + attention_backward,
        "pipeline": 3 * matmul + attention + attention_backward,
        "data": (3 * (matmul + elementwise + scores) + attention + attention_backward + again) / batches,
    }
    # The processes of a CPU that receive and sum take the cores from the computation.
    hidden = execution.hidden if hardware.cpu is None else frozenset[str]()
    exposed = {axis: max(0.0, time - computing[axis]) if axis in hidden else time for axis, time in seconds.items()}
    last = stage == work.layout.pipe - 1
    slower = busy_factor(hardware, work.layout.world_size)
    return StepTime(
        matmul=slower * 3 * matmul,
        attention=slower * (attention + attention_backward),
        routing=slower * routing,  # the choice has no backward
        head=slower * batches * _head(work, hardware) * last,
        elementwise=slower * 3 * (elementwise + scores),
        recomputation=slower * again,
        optimizer=_optimizer(work, hardware, stage),
        bubble=0.0,
        **exposed,
    )


def _attention(work: Workload, hardware: HardwareProfile, stage: int) -> tuple[float, float, float]:
    """Return the seconds of a stage's attention in a step, forward and backward, and of its routing."""
    layers = work.layers_of_stage[stage]
    if hardware.cpu is None:
        rate = hardware.efficiency * hardware.flops_per_second(work.config.train.precision)
        forward = work.microbatches * layers * work.attention_flops / rate
        # Backward takes two products for each of forward's.
        return forward, 2 * forward, work.microbatches * layers * work.routing_flops / rate
    first = sum(work.layers_of_stage[:stage])
    times = [attention_time(work, hardware.cpu, layer) for layer in range(first, first + layers)]
    forward, backward, routing = (
        work.microbatches * sum(part)
        for part in zip(*((t.forward, t.backward, t.routing) for t in times), strict=True)
    )
    return forward, backward, routing


def _matmul(work: Workload, hardware: HardwareProfile) -> float:
    """Return the seconds of a block's matrix products, forward: of their operations, or of their bytes if slower."""
    model, element = work.config.model, work.element_size
    rate = hardware.efficiency * hardware.flops_per_second(work.config.train.precision)
    rows = 2 * (work.query_size + work.key_size) + 3 * model.ffn_hidden_size
    moved = element * (work.block_matrices + work.tokens * rows) / work.layout.tensor
    moved += element * 4 * work.tokens * model.hidden_size
    return max(work.linear_flops / rate, moved / _memory_rate(hardware))


def _elementwise(work: Workload, hardware: HardwareProfile) -> float:
    """Return the seconds of a block's element by element operations, forward, bound by memory."""
    return elementwise_bytes(work) / _memory_rate(hardware, "elementwise") + _calls(hardware)


def elementwise_bytes(work: Workload) -> float:
    """Return the bytes that a block's element by element operations read and write, forward."""
    model, element = work.config.model, work.element_size
    # Two norms; two residuals that read two tensors and write one.
    residual = model.hidden_size * (2 * work.execution.norm_passes + 2 * 3 * element) / work.residual_ranks
    heads = work.query_size + work.key_size
    activation = 3 * model.ffn_hidden_size  # reads both halves, writes one
    split = element * (2 * heads + activation) + work.execution.norm_passes * heads * model.qk_norm
    split /= work.layout.tensor
    return work.tokens * (residual + split)


def _calls(hardware: HardwareProfile) -> float:
    """Return the seconds of a block's calls, forward, which do not depend on its size."""
    return 0.0 if hardware.cpu is None else 1e-3 * hardware.cpu.block_ms / 3


def _score_traffic(work: Workload, hardware: HardwareProfile) -> float:
    if not work.execution.keeps_scores:
        return 0.0
    model = work.config.model
    scores = work.tokens * model.sequence_length * model.num_heads / work.layout.tensor
    return work.element_size * SCORE_PASSES * scores / _memory_rate(hardware)


def _head(work: Workload, hardware: HardwareProfile) -> float:
    """Return the seconds of the LM head and the loss of a microbatch, forward and backward."""
    rate = hardware.efficiency * hardware.flops_per_second(work.config.train.precision)
    logits = work.tokens * work.config.padded_vocab_size / work.layout.tensor
    return 3 * work.head_flops / rate + work.execution.loss_bytes * logits / _memory_rate(hardware, "loss")


def _optimizer(work: Workload, hardware: HardwareProfile, stage: int) -> float:
    shards = work.data_ranks if work.layout.zero_stage else 1
    parameters = work.parameters_of_stage(stage) / shards
    return parameters * (OPTIMIZER_BYTES + work.element_size) / _memory_rate(hardware, "optimizer")


def _memory_rate(hardware: HardwareProfile, what: str = "") -> float:
    """Return the bandwidth of the memory in bytes/s: that of `what`, where it was measured apart."""
    rates: dict[str, float] = {} if hardware.cpu is None else {
        "elementwise": hardware.cpu.elementwise_gb_per_second,
        "loss": hardware.cpu.loss_gb_per_second,
        "optimizer": hardware.cpu.optimizer_gb_per_second,
    }  # fmt: skip
    return 1e9 * rates.get(what, hardware.memory_gb_per_second)


def _seconds(work: Workload, hardware: HardwareProfile, sent: list[Traffic], axis: Axis) -> float:
    """Return the seconds of an axis' communication in a step, if nothing runs beside it."""
    layout = work.layout
    size, stride = {
        "tensor": (layout.tensor, 1),
        "region": (layout.region, layout.tensor),
        "data": (work.data_ranks, layout.tensor),
        "pipeline": (layout.pipe, layout.tensor * layout.region * layout.data),
    }[axis]
    if axis == "pipeline" and layout.pipe > 1:
        size = 2  # neighbours only
    bandwidth, latency = hardware.bytes_per_second(size, stride), hardware.latency_seconds(size, stride)
    return sum(one.sent_bytes / bandwidth + one.messages * latency for one in sent if one.axis == axis)
