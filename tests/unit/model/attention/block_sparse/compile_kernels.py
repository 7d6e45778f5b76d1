"""Compile the kernels for sm_90 as a bf16 layer with H 32, G 8, D 128, L 64, k 32 launches them; a JSON line each."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from biroute.model.attention.block_sparse import attention, backward, forward, rotary, router
from biroute.model.attention.block_sparse.plan import Blocking

INTEGERS = ("order", "start", "unit_region", "unit_first", "extra_first", "listed", "members", "counts", "route")
FP32 = ("cosines", "sines", "lse", "part_lse", "delta", "dk", "dv", "extra_dk", "extra_dv", "rows")


def pointer(name: str) -> str:
    name = name.removesuffix("_ptr")
    return "*i1" if name == "scattered" else "*i32" if name in INTEGERS else "*fp32" if name in FP32 else "*bf16"


def report(kernel: Any, constants: dict[str, Any], warps: int) -> None:
    """Compile one kernel, let the assembler say what it takes, and print it."""
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else pointer(name) if name.endswith("_ptr")
        else "fp32" if name.startswith(("scale", "direction")) else "i32"
        for name in names
    }  # fmt: skip
    aligned = [name for name in names if name.endswith(("_ptr", "_tokens"))]
    source = ASTSource(
        kernel, signature, {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )  # fmt: skip
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": 2})
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        words = [get_ptxas(90).path, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        told = subprocess.run(words, capture_output=True, text=True, check=True).stderr
    found = {
        "name": kernel.__name__,
        "registers": int(re.findall(r"Used (\d+) registers", told)[0]),
        "spilled_bytes": int(re.findall(r"(\d+) bytes spill stores", told)[0]),
        "shared_bytes": compiled.metadata.shared,
    }
    sys.stdout.write(json.dumps(found) + "\n")


def main() -> None:
    sizes = Blocking.of(heads=4, block=1, region=64, head_size=128)
    constants = {"REGION": 64, "PARTS": sizes.parts, "PART": sizes.part, "KEYS": 64, "D": 128, "DIM": 128}
    products = constants | {"SLOTS": 32, "HEADS": 4, "CAUSAL": True, "PRECISION": "ieee"}
    token = products | {"BLOCK": 1, "SCATTERED": True}
    tile = token | {"TILE": sizes.tile, "LISTED": sizes.tile * 32 // sizes.shared_from}
    block = products | {"BLOCK": 64, "SCATTERED": False, "TILE": 1, "LISTED": 32}
    forward_token = {name: value for name, value in token.items() if name != "SCATTERED"}
    report(forward.region_forward, forward_token | {"ROWS": attention.FORWARD_ROWS, "UNIT": 256}, 4)
    report(forward.query_forward, tile | {"ROWS": attention.FORWARD_ROWS}, 4)
    report(forward.query_forward, block | {"ROWS": attention.BLOCK_ROWS}, 8)
    report(backward.region_backward, token | {"ROWS": attention.BACKWARD_ROWS, "UNIT": 1024}, 8)
    unit = products | {"BLOCK": 64, "SCATTERED": False, "ROWS": attention.BACKWARD_ROWS, "UNIT": 16}
    report(backward.region_backward, unit, 8)
    report(backward.query_backward, tile | {"ROWS": attention.BACKWARD_ROWS}, 4)
    report(backward.query_backward, block | {"ROWS": attention.BACKWARD_ROWS}, 4)
    report(backward.add_extra_units, constants, 4)
    report(backward.output_delta, {"D": 128, "DIM": 128, "ROWS": 32}, 4)
    report(rotary.rotate_rows, {"HALF": 64, "WIDTH": 64, "ROWS": rotary.ROWS}, 4)
    for width in (256, 2048):
        rule = {"SLOTS": 32, "DESCRIPTORS": 8, "BLOCK": 1, "REGION": 64, "D": 128, "DIM": 128, "PRECISION": "ieee"}
        forced = {"CAUSAL": True, "OWN": True, "PREVIOUS": True, "SINK": False}
        rows = {"BLOCKS": router.BLOCKS, "REGIONS": router.REGIONS, "WIDTH": width}
        at_once = min(router.BLOCKS, router.SELECTED_AT_ONCE // width)
        report(router.route_blocks, rule | forced | rows | {"AT_ONCE": at_once}, router.WARPS)


if __name__ == "__main__":
    main()
