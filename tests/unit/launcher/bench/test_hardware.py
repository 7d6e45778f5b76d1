"""A measured profile: what is written is what was measured, and `--hardware` takes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from biroute.configs.layout import resolve_layout
from biroute.configs.load import config_from_tree
from biroute.launcher.bench.hardware import Measured, profile_of, profile_text, write_profile
from biroute.launcher.plan.cpu_time import busy_factor
from biroute.launcher.plan.hardware import CpuRates, HardwareProfile, load_hardware
from biroute.launcher.plan.prediction import make_plan

PATH = {"forward_pair_ns": 1.5, "forward_gflops": 60.0, "backward_pair_ns": 2.0, "backward_gflops": 50.0}
CPU = {
    "dense": PATH, "masked": PATH, "tiles": PATH, "gather_gb_per_second": 3.0, "routing_gflops": 20.0,
    "choice_ns": 12.0, "elementwise_gb_per_second": 9.0, "loss_gb_per_second": 8.0, "optimizer_gb_per_second": 7.0,
    "block_ms": 1.2, "all_ranks_factor": 1.6,
}  # fmt: skip
MEASURED = Measured(
    flops_per_second_fp32=5e10, flops_per_second_bf16=2e10, memory_bytes_per_second=8e9,
    all_reduce_bytes_per_second=1.5e9, send_bytes_per_second=2e9, latency_seconds=2e-5, cpu=CPU,
)  # fmt: skip


def test_the_written_profile_is_the_measured_one(tmp_path: Path) -> None:
    text = profile_text(profile_of(MEASURED, 4), MEASURED)
    read = load_hardware(str(write_profile(text, tmp_path / "new")))
    assert (read.devices_per_node, read.efficiency, read.price_per_device_hour) == (4, 1, None)
    assert read.flops_per_second("fp32") == pytest.approx(5e10)
    assert read.flops_per_second("bf16") == pytest.approx(2e10)
    assert read.memory_gb_per_second == 8
    assert read.bytes_per_second(4, 1) == 1.5e9
    assert read.latency_seconds(2, 1) == pytest.approx(2e-5)
    assert "to one neighbour: 2" in text
    assert read.cpu == CpuRates.model_validate(CPU)


def test_ranks_that_compute_at_once_are_slower() -> None:
    """Of a node of four; and only what they compute, as the rest was measured together."""
    hardware = profile_of(MEASURED, 4)
    factors = [busy_factor(hardware, ranks) for ranks in (1, 2, 4, 8)]
    assert factors == pytest.approx([1.0, 1.2, 1.6, 1.6])
    assert busy_factor(hardware.model_copy(update={"cpu": None}), 4) == 1.0
    config = config_from_tree({"parallel": {"data": 2}, "data": {}}, "test")
    step = make_plan(config, resolve_layout(config, 2), hardware).step.parts()
    alone = make_plan(config, resolve_layout(config, 2), hardware_with(hardware, all_ranks_factor=1.0)).step.parts()
    computed = {"matmul", "attention", "routing", "head", "elementwise"}
    assert {name: step[name] / alone[name] for name in step if alone[name]} == pytest.approx(
        {name: 1.2 if name in computed else 1.0 for name in step if alone[name]}
    )
    assert computed | {"data", "optimizer"} == {name for name in step if alone[name]}


def hardware_with(hardware: HardwareProfile, **rates: float) -> HardwareProfile:
    assert hardware.cpu is not None
    return hardware.model_copy(update={"cpu": hardware.cpu.model_copy(update=rates)})


def test_every_number_says_how_it_was_found() -> None:
    lines = profile_text(profile_of(MEASURED, 4), MEASURED).splitlines()
    numbers = [line for line in lines if line[0] not in "#d"]  # all but the comment, device and devices_per_node
    assert len(numbers) == 9 + 1 + len(CPU)
    assert all("# " in line for line in numbers)
