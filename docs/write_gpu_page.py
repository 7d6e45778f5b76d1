"""Write docs/benchmarks/gpu_on_paper.md from the counts beside it: `make docs`. One tree, always the same bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biroute.configs.data_section import DataConfig, TokenizerConfig
from biroute.configs.schema import RunConfig
from biroute.launcher.bench.gpu.targets import (
    PARTS_TARGET,
    STEP_MODEL,
    STEP_TARGETS,
    STEP_VOCABULARY,
    TARGETS,
    Compared,
    Target,
)
from biroute.launcher.plan.hardware import HardwareProfile, load_hardware
from biroute.launcher.plan.step_time import OPTIMIZER_BYTES
from biroute.model.flops import parameter_count

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "gpu_on_paper.md"
COSTS = PAGE.with_suffix(".json")

HEADS, GROUPS, HEAD_SIZE, REGION, ELEMENT = 32, 8, 128, 64, 2
LAUNCH_SECONDS = 5e-6
SECOND_CACHE = 50e6  # bytes, of an H100 and an H200
PLAN = {"plan_groups", "place_regions", "sort_pairs"}

# Dense attention (PyTorch's), bf16, H 32, G 8, D 128, causal, on one NVIDIA H200, 2026-11-26, in ms: forward, and
# forward and backward together.
DENSE_H200 = {8_192: (0.93, 3.57), 32_768: (13.9, 53.5), 131_072: (260.0, 880.0)}
# What earlier kernels reached there, at 131,072 tokens: bytes (or operations, or affinities) and milliseconds.
DENSE_FLOPS = 2 * 131_072**2 * HEADS * HEAD_SIZE
MEASURED = {
    "products": (DENSE_FLOPS, 260.0, "dense attention, forward: {:.0f} TFLOP/s"),
    "cache": (1.1e12, 194.0, "a kernel that reads each query's keys and values anew, from the cache: {:.1f} TB/s"),
    "stream": (69e9, 22.0, "region by region, forward: {:.1f} TB/s of memory"),
    "back": (103e9, 44.0, "the same, backward: {:.1f} TB/s"),
    "merge": (35e9, 21.4, "joining the partial results of each query: {:.1f} TB/s"),
    # 1.43e9 affinities with padding; that kernel stopped once the count fitted, after 14 rounds with white noise:
    # with its other sums and scans 18.4 for each affinity.
    "scanned": (26.4e9, 10.0, "selecting: {:.1f} * 10^12 affinities that its sums and scans go through, per second"),
}


@dataclass(frozen=True)
class Rates:
    """What a part of the work takes its time from; per second."""

    products: float  # operations of matrix products
    cache: float  # bytes that come from the second cache
    stream: float  # bytes of memory: kernels that stream
    back: float  # the same, with the gradients of keys and values held in registers
    merge: float  # the same, many short pieces
    scanned: float  # affinities that sums and scans of the selection go through

    @staticmethod
    def expected(profile: HardwareProfile) -> Rates:
        """The rates measured on an H200, those of memory in proportion to its bandwidth."""
        memory = profile.memory_gb_per_second / load_hardware("h200").memory_gb_per_second
        peak = profile.peak_tflops_bf16 / load_hardware("h200").peak_tflops_bf16
        found = {name: amount / (ms / 1e3) for name, (amount, ms, _) in MEASURED.items()}
        for name in found:
            found[name] *= memory if name in ("stream", "back", "merge") else peak
        return Rates(**found)


def attention_seconds(row: dict[str, Any], rates: Rates) -> dict[str, float]:
    """Expected seconds of attention, forward and backward."""
    kernels, torch = row["kernels"], row["torch"]
    partials = kernels["forward"].get("region_forward", {}).get("written", 0)

    def around(side: str) -> float:
        """Launches, torch's operations, and the plan: short pieces all over memory."""
        number = sum(kernel["launches"] for kernel in kernels[side].values()) + torch[side]["launches"]
        plan = sum(kernels[side][name]["read"] + kernels[side][name]["written"] for name in PLAN & set(kernels[side]))
        return number * LAUNCH_SECONDS + torch[side]["moved"] / rates.stream + plan / rates.merge

    def tiles(kernel: dict[str, int], merged: float) -> float:
        shared = max(kernel["flops"] / rates.products, (kernel["read"] - merged) / rates.cache)
        return shared + merged / rates.merge + kernel["written"] / rates.stream

    forward = around("forward") + tiles(kernels["forward"]["query_forward"], partials)
    if partials:
        region = kernels["forward"]["region_forward"]
        forward += max(region["flops"] / rates.products, (region["read"] + region["written"]) / rates.stream)
    backward = around("backward") + tiles(kernels["backward"]["query_backward"], row["partial_dq_bytes"])
    region, of_tiles = kernels["backward"]["region_backward"], row["tiles_of_regions"]
    # Regions stream the same tiles: from the cache if all rows of a launch and head take half of it at most.
    rows = rates.cache if 2 * of_tiles["rows_at_once"] <= SECOND_CACHE else rates.stream
    backward += max(of_tiles["flops"] / rates.products, of_tiles["read"] / rows)
    moved = region["read"] + region["written"] - of_tiles["read"]
    backward += max((region["flops"] - of_tiles["flops"]) / rates.products, moved / rates.back)
    for name in ("output_delta", "finish_head", "join_units"):
        kernel = kernels["backward"].get(name, {"read": 0, "written": 0})
        backward += (kernel["read"] + kernel["written"]) / rates.stream
    return {"forward": forward, "backward": backward}


def layer_seconds(row: dict[str, Any], rates: Rates, descriptors: str = "8") -> dict[str, float]:
    """Expected seconds of the parts of a layer: router, forward, backward."""
    router = row["router"][descriptors]
    chosen, means = router["route_blocks"], router["mean_rows"]
    routing = (router["moved"] + means["read"] + means["written"]) / rates.stream
    routing += (router["launches"] + chosen["launches"] + means["launches"]) * LAUNCH_SECONDS
    routing += max(chosen["flops"] / rates.products, (chosen["read"] + chosen["written"]) / rates.cache)
    routing += chosen["scanned"] / rates.scanned
    return {"router": routing, **attention_seconds(row, rates)}


def least_seconds(row: dict[str, Any], profile: HardwareProfile) -> dict[str, float]:
    """What no kernel that follows this plan can beat: peak rates, each input read once, nothing but partial results
    written besides; no launches."""
    tokens, memory = row["tokens"], 1e9 * profile.memory_gb_per_second
    rows = tokens * HEADS * HEAD_SIZE * ELEMENT
    keys = 2 * tokens * GROUPS * HEAD_SIZE * ELEMENT
    partials = row["kernels"]["forward"].get("region_forward", {}).get("written", 0)
    moved = {"forward": 2 * rows + keys + 2 * partials, "backward": 4 * rows + 2 * keys + 2 * row["partial_dq_bytes"]}
    found = {}
    for side in ("forward", "backward"):
        flops = sum(kernel["flops"] for kernel in row["kernels"][side].values())
        found[side] = max(flops / (1e12 * profile.peak_tflops_bf16), moved[side] / memory)
    chosen = row["router"]["8"]["route_blocks"]
    found["router"] = max(chosen["flops"] / (1e12 * profile.peak_tflops_bf16), (rows + keys / 2) / memory)
    return found


def compared(row: dict[str, Any], profile: HardwareProfile) -> Compared:
    """A layer beside dense attention: how many times as fast it is expected to be."""
    dense_forward, dense_both = (ms / 1e3 for ms in DENSE_H200[row["tokens"]])
    rates = Rates.expected(profile)
    parts, single = layer_seconds(row, rates), sum(layer_seconds(row, rates, "1").values())
    total = sum(parts.values())
    # FlashAttention-2's: fp32 gradients of the queries; those of keys and values for every query head.
    buffers = row["tokens"] * HEADS * HEAD_SIZE * (4 + 2 * ELEMENT)
    peak, dense = row["torch"]["peak_bytes"], row["torch"]["dense_bytes"]
    return Compared(
        forward=dense_forward / (parts["router"] + parts["forward"]),
        both=dense_both / total,
        descriptors=total / single,
        router=parts["router"] / total,
        memory=peak / dense,
        memory_of_dense=peak / (dense + buffers),
    )


def _find(rows: list[dict[str, Any]], tokens: int, block: int, route: str = "trained") -> dict[str, Any]:
    return next(row for row in rows if (row["tokens"], row["block"], row["route"]) == (tokens, block, route))


def _target_row(rows: list[dict[str, Any]], target: Target) -> list[str]:
    h200, h100, scattered = (
        compared(_find(rows, target.tokens, target.block, route), load_hardware(gpu))
        for gpu, route in (("h200", "trained"), ("h100", "trained"), ("h200", "random"))
    )
    cells = [f"{target.found(one):.2f} (paper)" for one in (h200, h100, scattered)]
    return [target.text, f"{target.tokens:,}", str(target.block), target.bound, *cells,
            "yes" if target.met(h200) else "**no**"]  # fmt: skip


def _time_row(row: dict[str, Any]) -> list[str]:
    cells = [f"{row['tokens']:,}", str(row["block"]), row["route"]]
    for gpu in ("h200", "h100"):
        parts = layer_seconds(row, Rates.expected(load_hardware(gpu)))
        cells += [f"{1e3 * parts[name]:.1f}" for name in ("router", "forward", "backward")]
    least = least_seconds(row, load_hardware("h200"))
    forward, both = DENSE_H200[row["tokens"]]
    return [*cells, f"{1e3 * (least['router'] + least['forward']):.1f} / {1e3 * sum(least.values()):.1f}",
            f"{forward:g} / {both:g}"]  # fmt: skip


def _count_rows(row: dict[str, Any]) -> list[list[str]]:
    found = []
    router = {"router": {name: row["router"]["8"][name] for name in ("route_blocks", "mean_rows")}, **row["kernels"]}
    extra = {"router": row["router"]["8"], **{side: row["torch"][side] for side in ("forward", "backward")}}
    for side, kernels in router.items():
        flops, read, written, launches = (
            sum(kernel[name] for kernel in kernels.values()) for name in ("flops", "read", "written", "launches")
        )
        padding = "" if side == "router" else f"{1 - row['needed_flops'][side] / flops:.0%}"
        found.append([
            f"{row['tokens']:,}", str(row["block"]), row["route"], side, f"{flops / 1e12:.2f}", padding,
            f"{read / 1e9:.1f}", f"{written / 1e9:.1f}", f"{extra[side]['moved'] / 1e9:.1f}",
            f"{launches} + {extra[side]['launches']}",
        ])  # fmt: skip
    return found


def _tile_row(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['tokens']:,}", str(row["block"]), row["route"], f"{row['tiles']:,}",
        f"{row['shared_regions_of_a_tile']:.1f}", f"{row['scattered_pairs']:.0%}",
        f"{row['torch']['peak_bytes'] / 2**30:.2f}", f"{row['torch']['dense_bytes'] / 2**30:.2f}",
    ]  # fmt: skip


def _rank_row(row: dict[str, Any], layers: list[dict[str, Any]]) -> list[str]:
    rates = Rates.expected(load_hardware("h200"))
    whole = sum(attention_seconds(_find(layers, row["tokens"], row["block"]), rates).values())
    own, fetched = (sum(attention_seconds(row[part], rates).values()) for part in ("own", "fetched"))
    kernels = [one for part in ("own", "fetched") for side in row[part]["kernels"].values() for one in side.values()]
    launches = sum(kernel["launches"] for kernel in kernels) / row["ranks"]
    ratio = (own + fetched) / whole
    milliseconds = [f"{1e3 * seconds:.1f}" for seconds in (whole, own, fetched)]
    return [f"{row['tokens']:,}", str(row["block"]), str(row["ranks"]), *milliseconds, f"{launches:.0f}",
            f"{ratio:.2f}", "yes" if ratio <= PARTS_TARGET else "**no**"]  # fmt: skip


def _step_row(row: dict[str, Any]) -> list[str]:
    """A training step of `STEP_MODEL`: attention, products of matrices, the optimizer's bytes, and nothing else."""
    rates, tokens = Rates.expected(load_hardware("h200")), row["tokens"]
    data = DataConfig(tokenizer=TokenizerConfig(vocab_size=STEP_VOCABULARY))
    weights = parameter_count(RunConfig(model=STEP_MODEL, data=data))
    rest = 6 * weights * tokens / rates.products + OPTIMIZER_BYTES * weights / rates.stream
    dense = rest + STEP_MODEL.num_layers * DENSE_H200[tokens][1] / 1e3
    routed = rest + STEP_MODEL.num_layers * sum(layer_seconds(row, rates).values())
    asked = STEP_TARGETS[tokens]
    return [f"{tokens:,}", str(row["block"]), f"{1e3 * dense:.1f}", f"{1e3 * routed:.1f}", f"{dense / routed:.2f}",
            f">= {asked:g}", "yes" if dense / routed >= asked else "**no**"]  # fmt: skip


def _table(header: list[str], rows: list[list[str]], text_columns: tuple[int, ...] = (0,)) -> str:
    rule = ["---" if place in text_columns else "--:" for place in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def _rates() -> str:
    lines = []
    for amount, ms, text in MEASURED.values():
        lines.append("- " + text.format(amount / (ms / 1e3) / 1e12))
    return "\n".join(lines)


INTRODUCTION = """# The GPU kernels on paper

Made by `docs/write_gpu_page.py` from `gpu_on_paper.json`; do not edit. **No figure of today's kernels on this page
was measured**: the authors had no GPU when they were written. Dense attention's times were: PyTorch's own, one
NVIDIA H200, 2026-11-26.

A causal layer, bf16, one sequence, 32 query heads, 8 key/value heads of size 128, regions of 64 tokens, routes of
32 regions; with its router (8 descriptors where nothing else is said), without projections. Operations, bytes,
launches and tiles are *counted*: from a route follows everything that the kernels do
(`model/attention/block_sparse/cost.py`), and a test counts the same in Triton's interpreter, to the last byte.
`docs/count_gpu_costs.py` did that for two kinds of route:

- *trained*: a model of 3.4 M parameters (hidden size 256, 4 layers, 8 heads, 2 key/value heads, 500 steps of 4,096
  tokens of the demo's text, routes of 8 of 32 regions) read 131,072 tokens of English; the route of 32 regions
  that its queries and keys give, in 4 layers x 2 heads, stands for that of the 8 heads. Shorter sequences are its
  beginning.
- *random*: the own region, the one before, and 30 others at random: neighbours share least.

## Targets
"""
TIMES = """## Expected time of a layer, in ms

Each kernel takes as long as its products, its reads from the cache or its bytes of memory, whichever is slowest;
kernels and torch's operations follow one another, and each launch adds 5 us. The kernels of the plan move their bytes
at the lowest rate, that of joining; their own instructions, and the latency of integer operations in the cache that
set the bits of words, are not counted. No kernel like them was ever timed. The rates are those that *earlier
versions of the kernels* and dense attention reached on that H200, at 131,072 tokens. Times were measured; bytes and
affinities were computed from sizes, and backward's time is the measured one less that of joining. The threshold of
sharing and the router's tiles were chosen with these rates, too, so the page cannot confirm them. Tiles of 128 rows
are counted at dense attention's rate of products. The kernel that selected stopped when its count fitted, after 14
rounds of 32 with white noise (simulated); today's does all rounds, in two stages:
"""
AFTER_RATES = """\
`region_backward` streams tiles that share a region, whose rows lie together, and gathers those of scattered pairs.
The tiles take as long as their products, at the rate of dense attention, or their rows: from the cache where all
queries and upstream gradients that a launch sees of one head take half of the second cache (25 of 50 MB) at most,
since the programs at work then stream the same tiles again and again; elsewhere at the rate of streaming memory, as
if no row were ever found in the cache. So 8,192 tokens, and 32,768 with a route per token, are counted with the
cache. All else that this kernel moves, gathered rows, partial results and gradients of keys and values, goes at the
measured rate of gathering, backward. One part follows the other.

For an H100, rates of memory are lower in proportion to its bandwidth (3.35 of 4.8 TB/s), the others equal. *At
least*: data-sheet rates of the H200, each input read once, no launch: what no tuning of these kernels can beat,
forward / forward + backward.
"""
COUNTS = """## Counted

*Padding*: operations that the route does not ask for: masked and empty places of products, shared regions that not
all of a tile chose; backward, two of seven products, as each of its kernels computes the scores for itself.
*torch*: bytes of torch's own operations: zeros, and other types. Launches: of kernels (those of the plan and of the
descriptors are among them) + of torch's operations; they grow with S only through pieces of 768 MiB of partial
results.
"""
TILES = """\
A tile is 128 query rows (a block of 64 tokens: 256). *Shared*: regions that a tile attends as one product;
*scattered*: pairs of a query block and a region that are attended region by region. Peak: both directions, with
inputs and gradients, in GiB; dense: the same tensors of dense attention without any buffer of its kernels.
"""
RANKS = """## Region ranks

What the kernels of all ranks together take, forward and backward, on an H200, beside the whole layer's: attention
over a rank's own regions, and over those that it fetches, in one call for all heads and owners. Asked: at most 1.15
times. With these routes nothing is shipped. Not counted: router, what travels, and merging what was fetched.
"""
STEPS = """## Training steps

Of a model that is mostly attention: 4 layers, hidden size 1,024, 32 query heads and 8 key/value heads of size 128,
one sequence, trained routes, an H200. Attention as above, products of matrices at the rate of products, the bytes of
the optimizer at that of streaming; all else is left out on both sides. `biroute bench gpu --run RUN --text FILE`
measures the same: this model, with one trained route in all layers, and the router's time.
"""
LIMITS = """## What limits it

- *A route per token* of 131,072 tokens just meets the target of both directions; no such page can tell so exactly. On
  the H200, in ms: gathering queries and upstream gradients of scattered pairs, and writing their part of dq, 18;
  streaming the tiles that share a region 16 (12 if they came from the cache); products of the shared regions of a
  tile 11 forward and 9 backward; partial results written and read again, 8 forward, and read backward 9; selecting
  the k best regions 6, reading descriptors 6; the gradients of keys and values, which are read and written again for
  each segment of a sequence, 3; the plan 1 in each direction, as forward's plan is not kept for backward.
- *Short sequences*. At 8,192 tokens 32 regions are a quarter of the sequence, and tiles of 32 tokens visit most
  regions anyway; backward does seven products where dense attention does five. A layer is as fast as dense attention
  there and slower with fewer tokens, which were not counted, as dense attention was not measured there. `path="auto"`
  calls dense attention only where *every* region is routed, as another result would be wrong; `docs/gpu.md` says why
  dense attention under a mask does not help. Where sequences are that short, a route per region
  (`query_block_size` equal to `region_size`) or dense layers are faster.
- *Peak memory*. *Dense attention's peak* is its tensors and the buffers of FlashAttention-2's backward (fp32
  gradients of queries; those of keys and values for each query head); whether PyTorch calls that depends on the
  backend that it chooses. Scratch counts where sequences are short: 256 MiB at 8,192 tokens, so that a layer takes
  1.94 times dense attention's tensors there, and 1.08 times its peak.
- Not counted: anything about time that a profiler would show: occupancy, latency, the balance of programs.
"""


def text() -> str:
    """The page as Markdown."""
    counted = json.loads(COSTS.read_text(encoding="utf-8"))
    rows = counted["layers"]
    long = [row for row in rows if row["tokens"] > 8_192]
    parts = [
        INTRODUCTION,
        _table(
            ["target", "S", "Lq", "asked", "H200", "H100", "H200, random routes", "met on paper, H200"],
            [_target_row(rows, target) for target in TARGETS],
            (0, 3, 7),
        ),
        TIMES,
        _rates(),
        AFTER_RATES,
        _table(
            ["S", "Lq", "routes", "H200 router", "forward", "backward", "H100 router", "forward", "backward",
             "at least (paper)", "dense, H200, measured"],
            [_time_row(row) for row in rows],
            (2,),
        ),
        "All columns but the last are on paper.",
        COUNTS,
        _table(
            ["S", "Lq", "routes", "part", "TFLOP", "padding", "GB read", "GB written", "GB torch", "launches"],
            [cells for row in long for cells in _count_rows(row)],
            (2, 3),
        ),
        TILES,
        _table(
            ["S", "Lq", "routes", "tiles", "shared of a tile", "scattered", "peak", "dense"],
            [_tile_row(row) for row in rows],
            (2,),
        ),
        RANKS,
        _table(
            ["S", "Lq", "ranks", "whole ms", "own ms", "fetched ms", "launches of a rank", "ratio", "met on paper"],
            [_rank_row(row, rows) for row in counted["ranks"]],
            (8,),
        ),
        STEPS,
        _table(
            ["S", "Lq", "dense ms", "routed ms", "times as fast", "asked", "met on paper"],
            [_step_row(row) for row in rows if row["route"] == "trained"],
            (5, 6),
        ),
        LIMITS,
    ]  # fmt: skip
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
