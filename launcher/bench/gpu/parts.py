"""Part of `biroute bench gpu`: attention cut into the parts of region ranks, all on one device, beside the whole."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from biroute.launcher.bench.gpu.layer import Inputs, Layer, Marks, choose, kernels_path
from biroute.model.attention.grid import RegionGrid
from biroute.model.attention.partial import attention_delta, partial_attention, partial_attention_backward
from biroute.parallel.region.attention import own_regions
from biroute.parallel.region.costs import RegionLayout


class Part(NamedTuple):
    """The queries of one rank and the regions of one owner, with what backward needs of the whole route."""

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
    runs = [(_run([whole], device), _run(parts, device)) for _ in range(repeats + 1)][1:]  # the first warms up
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
    """Cut attention into parts: of each rank's queries with the regions of each owner up to itself."""
    block, size = whole.grid.query_block_size, whole.grid.region_size
    layout = RegionLayout(whole.k.shape[2] // size, size, ranks)
    shards = [slice(rank * layout.tokens_per_rank, (rank + 1) * layout.tokens_per_rank) for rank in range(ranks)]
    parts = []
    for rank, rows in enumerate(shards):
        q, dout, lse, delta = (x[:, :, rows].contiguous() for x in (whole.q, whole.dout, whole.lse, whole.delta))
        route = whole.route[:, :, rows.start // block : rows.stop // block]
        for owner, keys in enumerate(shards[: rank + 1]):
            k, v = (x[:, :, keys].contiguous() for x in (whole.k, whole.v))
            grid = replace(whole.grid, causal=owner == rank, same_tokens=owner == rank)
            parts.append(Part(q, k, v, own_regions(route, layout, owner), grid, dout, lse, delta))
    return parts


def _run(parts: Sequence[Part], device: torch.device) -> float:
    """Seconds of forward of all parts, then backward of all."""
    marks = Marks(device)
    for part in parts:
        partial_attention(part.q, part.k, part.v, part.route, part.grid)
    for part in parts:
        partial_attention_backward(
            part.q, part.k, part.v, part.route, part.grid, dout=part.dout, lse=part.lse, delta=part.delta
        )
    marks.mark()
    (seconds,) = marks.seconds()
    return seconds
