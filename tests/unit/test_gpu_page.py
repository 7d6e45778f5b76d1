"""docs/benchmarks/gpu_on_paper.md: it is what its script writes, and each rate counts in the times."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "write_gpu_page.py"
MEMORY = ("stream", "back", "merge")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_gpu_page", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_writes(script: ModuleType) -> None:
    assert script.PAGE.read_text(encoding="utf-8") == script.text(), "python docs/write_gpu_page.py"


def test_where_only_one_rate_is_finite_the_time_is_the_amount_over_it(script: ModuleType) -> None:
    row = next(
        row
        for row in json.loads(script.COSTS.read_text())["layers"]
        if row["block"] == 1 and row["route"] == "random"
    )
    names = script.Rates.__dataclass_fields__
    free = sum(script.layer_seconds(row, script.Rates(**dict.fromkeys(names, math.inf))).values())
    kernels = [kernel for side in row["kernels"].values() for kernel in side.values()]
    kernels += [row["router"]["8"][name] for name in ("route_blocks", "mean_rows")]
    launches = sum(kernel["launches"] for kernel in kernels) + row["router"]["8"]["launches"]
    launches += row["torch"]["forward"]["launches"] + row["torch"]["backward"]["launches"]
    assert free == pytest.approx(launches * script.LAUNCH_SECONDS)

    def beyond_launches(**rates: float) -> float:
        every = dict.fromkeys(names, math.inf) | rates
        return sum(script.layer_seconds(row, script.Rates(**every)).values()) - free

    assert beyond_launches(products=1.0) == pytest.approx(sum(kernel["flops"] for kernel in kernels))
    assert beyond_launches(scanned=1.0) == pytest.approx(row["router"]["8"]["route_blocks"]["scanned"])
    # Every byte counts once: as one of the cache or of memory, the router's written ones among the former.
    moved = sum(kernel["read"] + kernel["written"] for kernel in kernels) + row["router"]["8"]["moved"]
    moved += row["torch"]["forward"]["moved"] + row["torch"]["backward"]["moved"]
    assert beyond_launches(cache=1.0, **dict.fromkeys(MEMORY, 1.0)) == pytest.approx(moved)
