"""Hardware profiles: what a device and the links between devices can do, in a YAML file. No torch."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import yaml
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, ValidationError

from biroute.configs.cluster_profile import SHIPPED_HARDWARE
from biroute.configs.errors import UsageError
from biroute.configs.load import explain_problems, parse_yaml
from biroute.configs.section import Section

GIB = 1024**3


class AttentionRate(Section):
    """Time of one path of attention on a CPU: for each (query, key) pair of a head, and for its operations."""

    forward_pair_ns: float = Field(ge=0, description="time of a pair's softmax, forward, in nanoseconds")
    forward_gflops: PositiveFloat = Field(description="rate of the products, forward, in 10^9 FLOP/s")
    backward_pair_ns: float = Field(ge=0, description="time of a pair's softmax, backward, in nanoseconds")
    backward_gflops: PositiveFloat = Field(description="rate of the products, backward, in 10^9 FLOP/s")


class CpuRates(Section):
    """What a core of a CPU does beside products of large matrices, each rate measured apart, in fp32."""

    dense: AttentionRate = Field(description="PyTorch's causal attention")
    masked: AttentionRate = Field(description="attention over routes as dense attention under a mask")
    tiles: AttentionRate = Field(description="attention over routes in tiles of gathered regions or queries")
    gather_gb_per_second: PositiveFloat = Field(description="rows gathered into tiles and added back")
    routing_gflops: PositiveFloat = Field(description="affinities, products in fp64, in 10^9 FLOP/s")
    choice_ns: float = Field(ge=0, description="choosing the best, for each query block and region, in nanoseconds")
    elementwise_gb_per_second: PositiveFloat = Field(
        description="bytes of norms, residuals, rotary embedding and activation function, over the time that a block "
        "takes beyond its products and its attention"
    )
    loss_gb_per_second: PositiveFloat = Field(description="cross-entropy, bytes as a plan counts them")
    optimizer_gb_per_second: PositiveFloat = Field(description="a step of AdamW, bytes as a plan counts them")
    block_ms: float = Field(ge=0, description="time of a block of almost no size, forward and backward: calls")
    all_ranks_factor: float = Field(
        ge=1, description="how many times as long a block takes while all ranks of the node compute one"
    )


class HardwareProfile(Section):
    """A kind of node. Rates are peaks, in units of 10^9 or 10^12; only the memory's size is in GiB (2^30 bytes)."""

    device: str = Field(min_length=1, description="name of the device")
    peak_tflops_bf16: PositiveFloat = Field(description="peak rate of bf16 matrix products, dense, in 10^12 FLOP/s")
    peak_tflops_fp32: PositiveFloat = Field(description="the same for fp32")
    memory_gib: PositiveFloat = Field(description="memory of a device in GiB")
    memory_gb_per_second: PositiveFloat = Field(description="bandwidth of a device's memory in 10^9 bytes/s")
    devices_per_node: PositiveInt = Field(description="devices of a node; each is one rank")
    intra_node_gb_per_second: PositiveFloat = Field(
        description="bandwidth between devices of a node, per device and direction, in 10^9 bytes/s"
    )
    inter_node_gb_per_second: PositiveFloat = Field(
        description="bandwidth between nodes, per device and direction, in 10^9 bytes/s"
    )
    intra_node_latency_us: float = Field(0.0, ge=0, description="latency of a message inside a node in microseconds")
    inter_node_latency_us: float = Field(0.0, ge=0, description="the same between nodes")
    efficiency: float = Field(
        gt=0, le=1, description="fraction of the peak rate of matrix products that a training run reaches"
    )
    cpu: CpuRates | None = Field(None, description="rates of a CPU that are measured apart; left out: of a GPU")
    price_per_device_hour: float | None = Field(
        None, ge=0, description="price of a device for an hour, in any currency; left out: no cost is computed"
    )

    def flops_per_second(self, precision: str) -> float:
        """Return the peak rate of matrix products in FLOP/s for `precision`, "bf16" or "fp32"."""
        return 1e12 * (self.peak_tflops_bf16 if precision == "bf16" else self.peak_tflops_fp32)

    def crosses_nodes(self, size: int, stride: int) -> bool:
        """Return whether a group of `size` ranks, each `stride` ranks from the next, spans several nodes."""
        return (size - 1) * stride >= self.devices_per_node

    def bytes_per_second(self, size: int, stride: int) -> float:
        """Return the bandwidth that each rank of a group has in a collective, in bytes/s.

        Where several ranks of a group share a node, each carries a share of what leaves the node, through a network
        card of its own; so between nodes they have their cards together, up to the bandwidth inside the node.

        Args:
            size: ranks of the group.
            stride: distance between the numbers of neighbouring ranks.
        """
        if not self.crosses_nodes(size, stride):
            return 1e9 * self.intra_node_gb_per_second
        together = min(size, max(1, self.devices_per_node // stride))
        return 1e9 * min(self.intra_node_gb_per_second, together * self.inter_node_gb_per_second)

    def latency_seconds(self, size: int, stride: int) -> float:
        """Return the latency of one message between neighbouring ranks of a group in seconds."""
        crosses = self.crosses_nodes(size, stride)
        return 1e-6 * (self.inter_node_latency_us if crosses else self.intra_node_latency_us)


def shipped_names() -> list[str]:
    """Return the names of the profiles that ship with BiRoute."""
    folder = resources.files("biroute.configs").joinpath(SHIPPED_HARDWARE)
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_hardware(name: str, given_as: str = "--hardware ") -> HardwareProfile:
    """Read a hardware profile and check it.

    Args:
        name: a YAML file, or the name of a profile that ships with BiRoute.
        given_as: option or field that names it, for errors.

    Raises:
        UsageError: there is no such profile, or it is not valid; all problems are reported in one line.
    """
    path = Path(name)
    source = path if path.is_file() else resources.files("biroute.configs").joinpath(SHIPPED_HARDWARE, f"{name}.yaml")
    if not source.is_file():
        known = ", ".join(shipped_names())
        raise UsageError(
            f"{given_as}{name}: no such hardware profile; name one of {known}, or a YAML file: "
            "`biroute bench hardware --out .` makes ./this-machine.yaml for this machine"
        )
    try:
        tree = parse_yaml(source.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{given_as}{name}: not a readable YAML file ({' '.join(str(error).split())})") from None
    try:
        return HardwareProfile.model_validate({} if tree is None else tree)
    except ValidationError as error:
        raise UsageError(f"{given_as}{name}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    missing = [tuple(map(str, problem["loc"])) for problem in error.errors() if problem["type"] == "missing"]
    if not missing:
        return explain_problems(error, HardwareProfile)
    fields = "; ".join(f"{'.'.join(place)}: {_description(place)}" for place in missing)
    return f"missing {'field' if len(missing) == 1 else 'fields'}, add {fields}"


def _description(place: tuple[str, ...]) -> str:
    sections: tuple[type[BaseModel], ...] = (HardwareProfile, CpuRates, AttentionRate)
    section = sections[len(place) - 1]
    return str(section.model_fields[place[-1]].description)
