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

from biroute.model import cross_entropy_kernels, norm_kernels, swiglu_kernels
from biroute.model.attention.block_sparse import (
    attention,
    backward,
    descriptors,
    forward,
    plan,
    plan_kernels,
    rotary,
    router,
)
from biroute.model.attention.block_sparse.plan import Blocking

INTEGERS = ("order", "start", "unit_region", "unit_first", "extra_first", "listed", "members", "counts", "route",
            "seen", "table")  # fmt: skip
FP32 = ("cosines", "sines", "lse", "part_lse", "delta", "dk", "dv", "sum_dk", "sum_dv", "extra_dk", "extra_dv",
        "rows", "top", "total", "predicted", "weight", "scale", "part")  # fmt: skip


def pointer(name: str, whole: bool) -> str:
    name = name.removesuffix("_ptr")
    if whole and name in ("dk", "dv"):
        return "*bf16"
    return (
        "*i8"
        if name == "flags"
        else "*i64"
        if name == "label"
        else "*i32"
        if name in INTEGERS
        else "*fp32"
        if name in FP32
        else "*bf16"
    )


def report(kernel: Any, constants: dict[str, Any], warps: int, whole: bool = False) -> None:
    """Compile one kernel, let the assembler say what it takes, and print it."""
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else pointer(name, whole) if name.endswith("_ptr")
        else "fp32" if name.startswith(("scale", "direction", "largest", "eps")) else "i32"
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
    tile = token | {"TILE": sizes.tile, "LISTED": sizes.listed(32, 2048)}
    block = products | {"BLOCK": 64, "SCATTERED": False, "TILE": 1, "LISTED": 32}
    forward_token = {name: value for name, value in token.items() if name != "SCATTERED"}
    report(forward.region_forward, forward_token | {"ROWS": attention.STREAMED_ROWS, "UNIT": 256}, 4)
    report(forward.query_forward, tile | {"ROWS": attention.TILE_ROWS}, 8)
    report(forward.query_forward, block | {"ROWS": attention.TILE_ROWS}, 8)
    turned = sizes.turned()
    tile |= {"LISTED": turned.listed(32, 2048)}
    part = {"ROWS": attention.STREAMED_ROWS, "UNIT": 1024, "TILE_UNIT": 64, "WHOLE": False}
    report(backward.region_backward, tile | part, 8)
    whole_head = {"ROWS": attention.STREAMED_ROWS, "UNIT": 64, "TILE_UNIT": 64, "WHOLE": True}
    report(backward.region_backward, block | whole_head, 8, whole=True)
    report(backward.query_backward, tile | {"ROWS": attention.TILE_ROWS}, 8)
    report(backward.query_backward, block | {"ROWS": attention.TILE_ROWS}, 8)
    report(backward.finish_head, constants, 4, whole=True)
    report(backward.join_units, constants, 4, whole=True)
    report(backward.output_delta, {"D": 128, "DIM": 128, "ROWS": 32}, 4)
    means = {"HEADS": 4, "TOKENS": 1, "STEP": 1, "D": 128, "DIM": 128, "ROWS": descriptors.ROWS}
    report(descriptors.mean_rows, means, 4)
    report(rotary.rotate_rows, {"HALF": 64, "WIDTH": 64, "ROWS": rotary.ROWS}, 4)
    gated = {"ROWS": swiglu_kernels.ROWS, "WIDTH": swiglu_kernels.WIDTH}
    report(swiglu_kernels.gate_rows, gated, 4)
    report(swiglu_kernels.gate_rows_backward, gated, 4)
    for kernel in (cross_entropy_kernels.sum_rows, cross_entropy_kernels.replace_by_gradient):
        report(kernel, {"WIDTH": cross_entropy_kernels.WIDTH}, cross_entropy_kernels.WARPS)
    for width, warps in ((norm_kernels.LARGEST_WIDTH, 16), (128, 8)):  # a hidden state, a head
        row = {"ROWS": max(1, norm_kernels.ELEMENTS // width), "WIDTH": width}
        report(norm_kernels.norm_rows, row, warps)
        report(norm_kernels.norm_rows_backward, row, warps)
    whole = Blocking.of(heads=4, block=64, region=64, head_size=128)
    for one, kept in ((sizes, 1), (turned, 2), (whole, 0), (whole, 2)):
        tiles = plan.BITS // one.tile
        groups = {"SLOTS": 32, "GROUPS": 16, "SORTED": kept, "TILE": one.tile, "TILES": tiles, "ROWS": tiles,
                  "LISTED": one.listed(32, 2048), "PAIRS": one.tile * 32}  # fmt: skip
        report(plan_kernels.plan_groups, groups | {"SHARED_FROM": one.shared_from}, plan.WARPS)
        if kept:
            report(plan_kernels.sort_pairs, groups, plan.WARPS)
            places = {"UNIT": 1024, "TILE_UNIT": 64, "KINDS": kept, "REGIONS": plan.REGIONS_AT_ONCE}
            report(plan_kernels.place_regions, places | {"PROGRAMS": plan.COUNTERS_AT_ONCE}, plan.WARPS)
    for width in (256, 2048):
        rule = {
            "SLOTS": 32,
            "PLACES": 32,
            "DESCRIPTORS": 8,
            "BLOCK": 1,
            "REGION": 64,
            "D": 128,
            "DIM": 128,
            "PRECISION": "ieee",
        }
        forced = {"CAUSAL": True, "OWN": True, "PREVIOUS": True, "SINK": False}
        rows = {"BLOCKS": router.BLOCKS, "REGIONS": router.REGIONS, "WIDTH": width}
        few = {"FINALISTS": router.finalists(32, width), "GROUP": router.GROUP, "BITS_OF_BOUND": router.BITS_OF_BOUND}
        at_once = min(router.BLOCKS, router.SELECTED_AT_ONCE // width)
        report(router.route_blocks, rule | forced | rows | few | {"AT_ONCE": at_once}, router.WARPS)


if __name__ == "__main__":
    main()
