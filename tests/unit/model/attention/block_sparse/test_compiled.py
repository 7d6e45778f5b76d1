"""The kernels compiled for an H100 on a machine without one: they compile, and no register of the usual size spills.

Triton brings its own assembler. In a process of its own: in this one the kernels belong to the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("compile_kernels.py")


@pytest.mark.slow
def test_the_kernels_compile_for_an_h100_and_spill_no_register() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, PROGRAM], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["name"] for kernel in kernels} == {
        "region_forward", "query_forward", "region_backward", "query_backward", "finish_head", "output_delta",
        "route_blocks", "rotate_rows", "plan_groups", "place_regions", "sort_pairs", "mean_rows", "join_units",
        "gate_rows", "gate_rows_backward", "norm_rows", "norm_rows_backward", "sum_rows", "replace_by_gradient",
    }  # fmt: skip
    for kernel in kernels:
        assert kernel["spilled_bytes"] == 0, kernel
        assert kernel["shared_bytes"] <= 227 * 1024, kernel
