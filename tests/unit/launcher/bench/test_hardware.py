"""A measured profile: what is written is what was measured, and `--hardware` takes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from biroute.launcher.bench.hardware import Measured, profile_of, profile_text, write_profile
from biroute.launcher.plan.hardware import load_hardware

MEASURED = Measured(
    flops_per_second_fp32=5e10, flops_per_second_bf16=2e10, memory_bytes_per_second=8e9,
    all_reduce_bytes_per_second=1.5e9, send_bytes_per_second=2e9, latency_seconds=2e-5,
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


def test_every_number_says_how_it_was_found() -> None:
    lines = profile_text(profile_of(MEASURED, 4), MEASURED).splitlines()
    numbers = [line for line in lines if line[0] not in "#d"]  # all but the comment, device and devices_per_node
    assert len(numbers) == 9
    assert all("# " in line for line in numbers)
