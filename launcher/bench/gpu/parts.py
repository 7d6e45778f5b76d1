"""Part of `biroute bench gpu`: attention cut into the parts of region ranks, all on one device, beside the whole."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from biroute.launcher.bench.gpu.layer import Inputs, Layer, Marks, choose, kernels_path
from biroute.model.attention.grid import RegionGrid
from biroute.model.attention.partial import attention_delta, partial_attention, partial_attention_backward
from biroute.parallel.region.attention import own_regions, part_grid_of, region_table
from biroute.parallel.region.costs import ExchangeCosts, RegionLayout
from biroute.parallel.region.fetched_table import FetchedTable
from biroute.parallel.region.plan import plan_exchange


class Part(NamedTuple):
    """The queries of one rank and its own or its fetched regions, with what backward needs of the whole route."""

    q: Tensor
    k: Tensor
    v: Tensor
    route: Tensor
    grid: RegionGrid
    dout: Tensor
    lse: Tensor
    delta: Tensor


def measure_parts(
    layer: Layer, tokens: int, block: int, device: torch.device, repeats: int, ranks: int
) -> dict[str, Any]:
    """Measure attention as `ranks` region ranks would compute it beside the whole layer's.

    Nothing is sent, and joining the outputs is left out: what is measured is the work of the kernels on parts.

    Returns:
        Seconds of forward and backward, whole and of all parts together, and their ratio.
    """
    inputs = Inputs.draw(layer, tokens, device)
    whole = whole_attention(inputs, layer, block)
    parts = parts_of(whole, ranks)
    # Parts are added up in fp32. The first run of each warms up.
    runs = [(_run([whole], device), _run(parts, device, torch.float32)) for _ in range(repeats + 1)][1:]
    once, cut = (statistics.median(column) for column in zip(*runs, strict=True))
    return {"tokens": tokens, "block": block, "ranks": ranks, "seconds": once, "parts_seconds": cut,
            "ratio": cut / once}  # fmt: skip


def whole_attention(inputs: Inputs, layer: Layer, block: int) -> Part:
    """Attention of a whole sequence over the router's choice."""
    q, k, v = (x.detach() for x in inputs.leaves)
    route = choose(inputs, layer, block)
    grid = RegionGrid(layer.region_size, block, True, layer.head_size**-0.5, path=kernels_path(q.device))
    out, lse = partial_attention(q, k, v, route, grid)
    return Part(q, k, v, route, grid, inputs.dout, lse, attention_delta(out, inputs.dout))


def parts_of(whole: Part, ranks: int) -> list[Part]:
    """Cut attention as the exchange does: of each rank its own regions, and all that it fetches in one call."""
    grid = whole.grid
    block, size = grid.query_block_size, grid.region_size
    layout = RegionLayout(whole.k.shape[2] // size, size, ranks)
    heads, row = whole.q.shape[1] // whole.k.shape[1], whole.q.shape[3]
    costs = ExchangeCosts.of(
        region_size=size, query_block_size=block, heads_per_group=heads, head_size=row,
        element_size=whole.q.element_size(),
    )  # fmt: skip
    regions = region_table(whole.k, whole.v, size)
    part_grid = part_grid_of(grid, whole.q, heads * block, 0.0)
    parts = []
    for rank in range(ranks):
        rows = slice(rank * layout.tokens_per_rank, (rank + 1) * layout.tokens_per_rank)
        q, k, v, dout, lse, delta = (
            x[:, :, rows].contiguous() for x in (whole.q, whole.k, whole.v, whole.dout, whole.lse, whole.delta)
        )
        route = whole.route[:, :, rows.start // block : rows.stop // block]
        parts.append(Part(q, k, v, own_regions(route, layout, rank), grid, dout, lse, delta))
        requests = plan_exchange(route, layout, rank, costs, "fetch").transfers
        table = FetchedTable.of(route, layout, requests)
        if table is not None:
            group, region = requests.fetched_places(layout.regions_per_rank)
            k, v = table.keys(regions[group * layout.num_regions + region], len(q))
            parts.append(Part(q, k, v, table.route, part_grid, dout, lse, delta))
    return parts


def _run(parts: Sequence[Part], device: torch.device, out_dtype: torch.dtype | None = None) -> float:
    """Seconds of forward of all parts, then backward of all; outputs and gradients of `out_dtype`, or the inputs'."""
    marks = Marks(device)
    for part in parts:
        partial_attention(part.q, part.k, part.v, part.route, part.grid, out_dtype=out_dtype)
    for part in parts:
        partial_attention_backward(
            part.q, part.k, part.v, part.route, part.grid, dout=part.dout, lse=part.lse, delta=part.delta,
            out_dtype=out_dtype,
        )  # fmt: skip
    marks.mark()
    (seconds,) = marks.seconds()
    return seconds
