"""Hardware profiles: what ships, what a link gives, and what is wrong with a file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from biroute.configs.errors import UsageError
from biroute.launcher.plan.hardware import HardwareProfile, load_hardware, shipped_names

ROOT = Path(__file__).resolve().parents[4]
PROFILE = HardwareProfile(
    device="test", peak_tflops_bf16=100, peak_tflops_fp32=10, memory_gib=1, memory_gb_per_second=1000,
    devices_per_node=8, intra_node_gb_per_second=450, inter_node_gb_per_second=50, efficiency=0.5,
)  # fmt: skip


@pytest.mark.parametrize("name", shipped_names())
def test_every_number_of_a_shipped_profile_names_its_source(name: str) -> None:
    assert load_hardware(name).price_per_device_hour is None
    for line in (ROOT / "configs" / "hardware" / f"{name}.yaml").read_text().splitlines():
        if re.match(r"\w+: [0-9.]", line):
            assert re.search(r"# .*(data sheet|the same|docs/benchmarks/plan.md|h100|a100)", line), line


@pytest.mark.parametrize(
    ("size", "stride", "gigabytes"),
    [
        (8, 1, 450),  # inside a node
        (16, 1, 400),  # eight ranks of a node share eight network cards, below the 450 inside
        (4, 4, 100),  # two ranks of each node
        (48, 8, 50),  # one rank of each node
        (2, 8, 50),  # neighbouring pipeline stages
        (2, 4, 450),  # two ranks, four apart, in one node
    ],
)
def test_the_bandwidth_of_a_group(size: int, stride: int, gigabytes: float) -> None:
    assert PROFILE.bytes_per_second(size, stride) == gigabytes * 1e9


def test_a_profile_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(f"{name}: {value}" for name, value in PROFILE.model_dump(exclude_none=True).items()))
    assert load_hardware(str(path)) == PROFILE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("device: x\n", "missing fields, add peak_tflops_bf16: peak rate of bf16"),
        ("- 1\n", "expected lines of the form"),
        ("a: [\n", "not a readable YAML file"),
    ],
)
def test_a_wrong_profile_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=re.escape(message)) as found:
        load_hardware(str(path))
    assert "\n" not in str(found.value)
    assert str(path) in str(found.value)


def test_a_missing_and_an_unknown_field(tmp_path: Path) -> None:
    values = PROFILE.model_dump(exclude_none=True)
    path = tmp_path / "profile.yaml"
    path.write_text("\n".join(f"{name}: {value}" for name, value in values.items() if name != "memory_gib"))
    with pytest.raises(UsageError, match="missing field, add memory_gib: memory of a device in GiB"):
        load_hardware(str(path))
    path.write_text("\n".join(f"{name}: {value}" for name, value in {**values, "memory_gb": 1}.items()))
    with pytest.raises(UsageError, match="unknown key memory_gb; did you mean"):
        load_hardware(str(path))


def test_an_unknown_name_lists_what_ships() -> None:
    with pytest.raises(
        UsageError, match=r"--hardware h99: no such hardware profile; .*a100, a100-40, b200, h100, h200"
    ):
        load_hardware("h99")
