"""What the kernels compute and move for a route, counted from the plan that they follow.

A cost counts what programs ask for: operations of matrix products with all padding and masked elements, and bytes
that loads and stores name, whether a cache serves them or not. The same arrays decide here and on the GPU, so the
counts are exact for a route; a test counts them in Triton's interpreter.

Tensors of q, k and v may be on torch's meta device, which has sizes and no memory: only the route is read.

Shapes: B sequences, H query heads, G key/value heads, Z = B * G, r = H / G, D head size, L region size, N query
blocks, K slots of a route, n descriptors of a region.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import triton
from torch import Tensor

from biroute.model.attention.block_sparse import attention, descriptors, router
from biroute.model.attention.block_sparse.attention import Call, Launch
from biroute.model.attention.block_sparse.plan import Sorted, TilePlan, plan_programs
from biroute.model.attention.block_sparse.plan_kernels import LAST
from biroute.model.attention.rule import RouteRule


@dataclass(frozen=True)
class Cost:
    """What one kernel does in a pass, over all its launches.

    Attributes:
        launches: of the kernel.
        programs: of all launches, those included that return at once.
        flops: operations of matrix products as computed, a multiply and an add being two.
        read: bytes loaded.
        written: bytes stored.
        scanned: elements that the router's sums, maxima and scans go through while it selects, padding included.
    """

    launches: int = 0
    programs: int = 0
    flops: int = 0
    read: int = 0
    written: int = 0
    scanned: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


def forward_cost(call: Call) -> dict[str, Cost]:
    """The cost of `sparse_attention`, by kernel.

    Args:
        call: as made by `Call.of` from the same tensors.
    """
    region, query = Cost(), Cost()
    launches = list(call.forward_launches())
    for launch in launches:
        if launch.visits is not None:
            region += _region_forward(call, launch)
        query += _programs(*call.tiles(launch)[0])
    query += _tiles(call, launch.plan, dots=2)
    rows, scattered = _query_rows(call), _scattered_pairs(call, launch.plan) * call.sizes.rows
    query += Cost(
        read=rows * _row(call) + scattered * call.sizes.parts * (_row(call) + 4), written=rows * (_row(call) + 4)
    )
    which: Sorted = "none" if call.sizes.all_shared else "scattered"
    found = {**plan_cost(call, launches, which), "region_forward": region, "query_forward": query}
    return {name: cost for name, cost in found.items() if cost.launches}


def backward_cost(call: Call) -> dict[str, Cost]:
    """The cost of `output_delta` and `sparse_attention_backward`, by kernel.

    Args:
        call: as made by `Call.of` from the same tensors; the gradient of the output has the type of q.
    """
    call = call.turned()
    region, query, extra = Cost(), Cost(), Cost()
    launches = list(call.backward_launches())
    for launch in launches:
        region += _region_backward(call, launch)
        extra += _add_units(call, launch)
        query += _programs(*call.tiles(launch)[0])
    query += _tiles(call, launch.plan, dots=3)
    rows, scattered = _query_rows(call), _scattered_pairs(call, launch.plan) * call.sizes.rows
    query += Cost(
        read=rows * (2 * _row(call) + 8) + scattered * call.sizes.parts * _row(call), written=rows * _row(call)
    )
    delta = _programs(triton.cdiv(rows, 32)) + Cost(read=2 * rows * _row(call), written=rows * 4)
    found = {"output_delta": delta, **plan_cost(call, launches, "all"), "region_backward": region,
             "join_units" if call.whole else "finish_head": extra, "query_backward": query}  # fmt: skip
    return {name: cost for name, cost in found.items() if cost.launches}


def plan_cost(call: Call, launches: list[Launch], which: Sorted) -> dict[str, Cost]:
    """The cost of `make_plan`, by kernel.

    Args:
        call: the sizes and the route.
        launches: those that the plan was made for.
        which: the pairs that it sorts.
    """
    plan, visits, blocks = launches[0].plan, launches[0].visits, launches[0].blocks
    segments = call.route.shape[0] * launches[0].chunks
    programs = plan_programs(call.route, call.regions, call.sizes, blocks, which)[2]
    pairs, real, several = call.route.numel(), int((call.route >= 0).sum()), int(call.sizes.tile > 1)
    words = real * (several or which != "none")  # set, read and cleared
    groups = _programs(programs, segments) + Cost(
        read=4 * pairs + 8 * words,
        written=8 * words + 4 * (1 + several) * int(plan.counts.sum()) + 4 * plan.counts.numel(),
    )
    if visits is None:
        return {"plan_groups": groups}
    lasts = int(((plan.flags >= 0) & ((plan.flags & LAST.value) != 0)).sum())
    chosen = int((plan.flags >= 0).sum())
    counters = segments * programs * call.regions * visits.kinds
    places = segments * ((visits.kinds + 2) * call.regions + 3) + visits.unit_region.numel()
    return {
        "plan_groups": groups + Cost(read=4 * lasts, written=pairs + 4 * lasts),
        "place_regions": _programs(segments) + Cost(read=8 * counters, written=4 * counters + 4 * places),
        "sort_pairs": _programs(programs, segments) + Cost(read=pairs + 8 * chosen, written=4 * (chosen + lasts)),
    }


def router_cost(
    route: Tensor, rule: RouteRule, *, head_size: int, element_size: int, num_regions: int, first_token: int = 0
) -> Cost:
    """The cost of the kernel of `fused_route`; of finalists that it moves, the most, unless many are equal or nearly.

    Args:
        route: [B, G, N, K] what it chose.
        rule: how.
        head_size: D.
        element_size: bytes of an element of the descriptors.
        num_regions: R, of the whole sequence.
        first_token: as in `fused_route`.
    """
    heads, num_blocks = route.shape[0] * route.shape[1], route.shape[2]
    row = head_size * element_size
    dim = max(16, triton.next_power_of_2(head_size))
    total = Cost(read=heads * num_blocks * row, written=route.numel() * 4)
    first_block = first_token // rule.query_block_size
    for _, tiles, columns in router.stretches(num_blocks, first_block, num_regions, rule):
        width = max(16, triton.next_power_of_2(columns))
        products = triton.cdiv(columns, router.REGIONS)
        keys, stored = (min(products * router.REGIONS, most) for most in (num_regions, width))
        total += _programs(min(router.PROGRAMS, tiles * heads))
        rows = tiles * heads * router.BLOCKS
        few = router.finalists(rule.topk, width)
        moved = 0 if few == width else 8 * rows * rule.topk * router.GROUP
        total += Cost(
            flops=rows * products * rule.descriptors_per_region * 2 * router.REGIONS * dim,
            read=tiles * heads * rule.descriptors_per_region * keys * row + rows * columns * 4 + moved,
            written=rows * stored * 4 + moved,
            scanned=rows * router.scanned(width, few),
        )
    return total


def descriptors_cost(x: Tensor, groups: int, tokens: int, step: int, element_size: int) -> Cost:
    """The cost of the kernel of `mean_descriptors`.

    Args:
        x, groups, tokens, step: its arguments; x may be on the meta device.
        element_size: bytes of an element of its result.
    """
    batch, heads, num_tokens, size = x.shape
    rows = num_tokens // step
    means = batch * groups * rows * size
    return _programs(triton.cdiv(rows, descriptors.ROWS), batch * groups) + Cost(
        read=means * heads // groups * tokens * x.element_size(), written=means * element_size
    )


def visible_pairs(route: Tensor, tokens: int, call: Call) -> int:
    """(query, key) pairs that attention over the route needs, of one query head of each key/value head.

    Args:
        route: int32 [Z, N, K].
        tokens: S, of the queries.
        call: the sizes.
    """
    size, block = call.grid.region_size, call.grid.query_block_size
    token_NM = torch.arange(tokens).view(-1, block)
    total = 0
    for route_NK in route:
        if not call.grid.causal:
            total += int((route_NK >= 0).sum()) * block * size
            continue
        seen = token_NM[:, None] + 1 - (route_NK * size)[:, :, None]  # [N, K, M]
        total += int((seen.clamp_(0, size) * (route_NK >= 0)[:, :, None]).sum())
    return total


def needed_flops(call: Call) -> tuple[int, int]:
    """Operations that the route asks for, without padding and masked elements: forward, and backward."""
    pairs = visible_pairs(call.route, call.tokens[0], call) * call.sizes.heads
    return 4 * pairs * call.q.shape[3], 10 * pairs * call.q.shape[3]


def _programs(*grid: int) -> Cost:
    number = 1
    for size in grid:
        number *= size
    return Cost(launches=1, programs=number)


def _row(call: Call) -> int:
    """Bytes of a row of q, k, v or a gradient."""
    return call.q.shape[3] * call.q.element_size()


def _query_rows(call: Call) -> int:
    return call.route.shape[0] * call.route.shape[1] * call.sizes.rows


def _scattered_pairs(call: Call, plan: TilePlan) -> int:
    return 0 if call.sizes.all_shared else int(plan.scattered.sum())


def _product(call: Call, rows: int) -> int:
    """Operations of one product of a program, of queries and a part of a region."""
    constants = call.constants()
    return int(2 * rows * constants["KEYS"] * constants["DIM"])


@dataclass(frozen=True)
class _Units:
    """The units of one launch that have visits."""

    active: int
    firsts: int  # those that are the first one of a region
    alone: int  # those that are the only one of a region
    pairs: int
    tiles: int
    products: int  # of pairs, for each part of a region

    @staticmethod
    def of(call: Call, launch: Launch, rows_of_product: int) -> _Units:
        visits = launch.visits
        assert visits is not None
        starts = visits.start[launch.first : launch.first + launch.segments]
        counts = starts.diff(dim=1).long().view(-1, call.regions, visits.kinds)
        pairs, tiles = counts[..., -1], counts[..., 0] * (visits.kinds - 1)
        full, rest = pairs // visits.unit_size, pairs % visits.unit_size
        rows = call.sizes.rows
        of_rest = (rest * rows + rows_of_product - 1) // rows_of_product
        of_full = triton.cdiv(visits.unit_size * rows, rows_of_product)
        units = torch.maximum(full + (rest > 0), (tiles + visits.tile_unit - 1) // visits.tile_unit)
        return _Units(
            active=int(units.sum()),
            firsts=int((units > 0).sum()),
            alone=int((units == 1).sum()),
            pairs=int(pairs.sum()),
            tiles=int(tiles.sum()),
            products=int((full * of_full + of_rest).sum()),
        )


def _region_forward(call: Call, launch: Launch) -> Cost:
    visits, parts = launch.visits, call.sizes.parts
    assert visits is not None
    units = _Units.of(call, launch, attention.STREAMED_ROWS)
    cost = _programs(visits.unit_region.shape[1], launch.segments, parts)
    rows = units.pairs * call.sizes.rows * parts
    return cost + Cost(
        flops=units.products * parts * 2 * _product(call, attention.STREAMED_ROWS),
        read=4 * cost.programs + units.active * (12 * parts + 2 * call.sizes.region * _row(call))
        + rows * (4 + _row(call)),
        written=rows * (_row(call) + 4),
    )  # fmt: skip


def _region_backward(call: Call, launch: Launch) -> Cost:
    visits, parts = launch.visits, call.sizes.parts
    assert visits is not None
    units = _Units.of(call, launch, attention.STREAMED_ROWS)
    cost = _programs(visits.unit_region.shape[1], launch.segments, parts)
    scatters = not call.sizes.all_shared
    rows = units.pairs * call.sizes.rows * parts
    gradients = 2 * call.sizes.region * call.q.shape[3] * 4  # fp32 dk and dv of a region
    cost += tiles_of_regions(call, launch) + Cost(
        flops=units.products * parts * 5 * _product(call, attention.STREAMED_ROWS),
        read=4 * cost.programs + units.active * ((12 + 8 * scatters) * parts + 2 * call.sizes.region * _row(call))
        + rows * (4 + 2 * _row(call) + 8),
        written=rows * _row(call),
    )  # fmt: skip
    if call.whole:
        written = units.alone * _gradients(call) + (units.active - units.alone) * gradients
        return cost + Cost(read=units.active * parts * 4, written=written)
    # What earlier segments of the head visited is looked up in their plans.
    chosen, before = _visited(launch, launch.first), launch.first % launch.chunks
    again = int((chosen & _visited(launch, *range(launch.first - before, launch.first))).sum())
    looked = 8 * before * units.firsts * parts
    return cost + Cost(read=again * gradients + looked + units.active * parts * 4, written=units.active * gradients)


def tiles_of_regions(call: Call, launch: Launch) -> Cost:
    """What a launch of `region_backward` does for the tiles that share regions: products and rows as they lie."""
    sizes, num_blocks = call.sizes, call.route.shape[1]
    tiles = launch.plan.counts.shape[1]
    blocks = (num_blocks - torch.arange(tiles) * sizes.tile).clamp(max=sizes.tile)  # the last tile may have fewer
    # A launch is part of one head, or some whole heads.
    head, segment = launch.first // launch.chunks, launch.first % launch.chunks
    of_heads = slice(head, head + max(1, launch.segments // launch.chunks))
    first = segment * launch.blocks // sizes.tile
    some = slice(first, first + triton.cdiv(launch.blocks, sizes.tile))
    counts = launch.plan.counts[of_heads, some].cpu().long()
    pieces = int(counts.sum()) * triton.cdiv(sizes.tile * sizes.rows, attention.STREAMED_ROWS) * sizes.parts
    rows = int((counts * blocks[some]).sum()) * sizes.rows * sizes.parts
    return Cost(
        flops=pieces * 4 * _product(call, attention.STREAMED_ROWS),
        read=pieces * (8 if sizes.tile > 1 else 4) + rows * (2 * _row(call) + 8),
    )


def _visited(launch: Launch, *segments: int) -> Tensor:
    """Which regions have visits in any of the segments, bool [R]."""
    assert launch.visits is not None
    starts = launch.visits.start[list(segments), :: launch.visits.kinds]
    return (starts.diff(dim=1) > 0).any(0)


def _gradients(call: Call) -> int:
    """Bytes of dk and dv of a region in the type of k."""
    return 2 * call.sizes.region * call.k.shape[3] * call.k.element_size()


def _add_units(call: Call, launch: Launch) -> Cost:
    visits = launch.visits
    assert visits is not None
    some = slice(launch.first, launch.first + launch.segments)
    cost = _programs(call.regions, launch.segments, call.sizes.parts)
    gradients = 2 * call.sizes.region * call.q.shape[3] * 4
    if call.whole:
        units = visits.unit_first[some].diff(dim=1)
        several, none = units > 1, units == 0
        written = int((several | none).sum()) * _gradients(call)
        return cost + Cost(read=8 * cost.programs + int(units[several].sum()) * gradients, written=written)
    if not launch.last_of_head:
        return Cost()
    segments = range(launch.first + 1 - launch.chunks, launch.first + 1)
    extras = int(visits.extra_first[list(segments)].diff(dim=1).sum())
    summed = int(_visited(launch, *segments).sum())
    return cost + Cost(
        read=16 * launch.chunks * cost.programs + (summed + extras) * gradients,
        written=call.regions * _gradients(call),
    )


def _tiles(call: Call, plan: TilePlan, dots: int) -> Cost:
    """What the tile kernels do for shared regions, and what they read to know their work; over all launches."""
    sizes = call.sizes
    row_parts = triton.cdiv(sizes.tile * sizes.rows, call.rows_of_product)
    shared = int(plan.counts.sum()) * row_parts
    lists = 4 * sizes.parts * (2 if sizes.tile > 1 else 1)
    flags = 0 if sizes.all_shared else _query_rows(call) * call.route.shape[2]
    return Cost(
        flops=shared * sizes.parts * dots * _product(call, call.rows_of_product),
        read=4 * plan.counts.numel() * row_parts + shared * (lists + 2 * sizes.region * _row(call)) + flags,
    )
