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

from biroute.model.attention.block_sparse import attention, router
from biroute.model.attention.block_sparse.attention import Call, Launch
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
        held: affinities that programs of the router hold on chip while they select, padding included.
    """

    launches: int = 0
    programs: int = 0
    flops: int = 0
    read: int = 0
    written: int = 0
    held: int = 0

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
    for launch in call.forward_launches():
        if launch.visits is not None:
            region += _region_forward(call, launch)
        query += _programs(*call.tiles(launch, attention.rows_of_product(call.sizes))[0])
    rows_of_product = call.tiles(launch, attention.rows_of_product(call.sizes))[1]["ROWS"]
    query += _tiles(call, rows_of_product, dots=2)
    rows, scattered = _query_rows(call), _scattered_rows(call)
    query += Cost(
        read=rows * _row(call) + scattered * call.sizes.parts * (_row(call) + 4), written=rows * (_row(call) + 4)
    )
    return {"region_forward": region, "query_forward": query} if region.launches else {"query_forward": query}


def backward_cost(call: Call) -> dict[str, Cost]:
    """The cost of `output_delta` and `sparse_attention_backward`, by kernel.

    Args:
        call: as made by `Call.of` from the same tensors; the gradient of the output has the type of q.
    """
    region, query, extra = Cost(), Cost(), Cost()
    for launch in call.backward_launches():
        region += _region_backward(call, launch)
        extra += _add_extra_units(call, launch)
        query += _programs(*call.tiles(launch, attention.BACKWARD_ROWS)[0])
    query += _tiles(call, call.tiles(launch, attention.BACKWARD_ROWS)[1]["ROWS"], dots=3)
    rows, scattered = _query_rows(call), _scattered_rows(call)
    query += Cost(
        read=rows * (2 * _row(call) + 8) + scattered * call.sizes.parts * _row(call), written=rows * _row(call)
    )
    delta = _programs(triton.cdiv(rows, 32)) + Cost(read=2 * rows * _row(call), written=rows * 4)
    found = {"output_delta": delta, "region_backward": region, "add_extra_units": extra, "query_backward": query}
    return {name: cost for name, cost in found.items() if cost.launches}


def router_cost(
    route: Tensor, rule: RouteRule, *, head_size: int, element_size: int, num_regions: int, first_token: int = 0
) -> Cost:
    """The cost of the kernel of `fused_route`.

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
    total = Cost(read=heads * num_blocks * row, written=int((route >= 0).sum()) * 4)
    first_block = first_token // rule.query_block_size
    for _, tiles, columns in router.stretches(num_blocks, first_block, num_regions, rule):
        width = max(16, triton.next_power_of_2(columns))
        products = triton.cdiv(columns, router.REGIONS)
        keys, stored = (min(products * router.REGIONS, most) for most in (num_regions, width))
        total += _programs(min(router.PROGRAMS, tiles * heads))
        total += Cost(
            flops=tiles * heads * products * rule.descriptors_per_region * 2 * router.BLOCKS * router.REGIONS * dim,
            read=tiles * heads * (rule.descriptors_per_region * keys * row + router.BLOCKS * columns * 4),
            written=tiles * heads * router.BLOCKS * stored * 4,
            held=tiles * heads * router.BLOCKS * width,
        )
    return total


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


def _scattered_rows(call: Call) -> int:
    return int(call.plan.scattered.sum()) * call.sizes.rows


def _product(call: Call, rows: int) -> int:
    """Operations of one product of a program, of queries and a part of a region."""
    constants = call.constants()
    return int(2 * rows * constants["KEYS"] * constants["DIM"])


@dataclass(frozen=True)
class _Units:
    """The units of one launch that have visits."""

    active: int
    firsts: int  # those that are the first one of a region
    visits: int
    products: int  # for each part of a region

    @staticmethod
    def of(call: Call, launch: Launch, rows_of_product: int) -> _Units:
        visits = launch.visits
        assert visits is not None
        counts = visits.start[launch.first : launch.first + launch.segments].diff(dim=1).long()
        full, rest = counts // visits.unit_size, counts % visits.unit_size
        rows = call.sizes.rows
        of_rest = (rest * rows + rows_of_product - 1) // rows_of_product
        of_full = triton.cdiv(visits.unit_size * rows, rows_of_product)
        return _Units(
            active=int((full + (rest > 0)).sum()),
            firsts=int((counts > 0).sum()),
            visits=int(counts.sum()),
            products=int((full * of_full + of_rest).sum()),
        )


def _region_forward(call: Call, launch: Launch) -> Cost:
    visits, parts = launch.visits, call.sizes.parts
    assert visits is not None
    units = _Units.of(call, launch, attention.FORWARD_ROWS)
    cost = _programs(visits.unit_region.shape[1], launch.segments, parts)
    rows = units.visits * call.sizes.rows * parts
    return cost + Cost(
        flops=units.products * parts * 2 * _product(call, attention.FORWARD_ROWS),
        read=4 * cost.programs + units.active * (12 * parts + 2 * call.sizes.region * _row(call))
        + rows * (4 + _row(call)),
        written=rows * (_row(call) + 4),
    )  # fmt: skip


def _region_backward(call: Call, launch: Launch) -> Cost:
    visits, parts = launch.visits, call.sizes.parts
    assert visits is not None
    units = _Units.of(call, launch, attention.BACKWARD_ROWS)
    cost = _programs(visits.unit_region.shape[1], launch.segments, parts)
    scatters = not call.sizes.all_shared
    rows = units.visits * call.sizes.rows * parts
    gradients = 2 * call.sizes.region * call.q.shape[3] * 4  # fp32 dk and dv of a region
    head, segment = launch.first // launch.chunks, launch.first % launch.chunks
    # A launch is part of one head, or some whole heads.
    first = segment * launch.blocks
    heads = slice(head, head + max(1, launch.segments // launch.chunks))
    scattered = int(call.plan.scattered[heads, first : first + launch.blocks].sum()) * call.sizes.rows * parts
    return cost + Cost(
        flops=units.products * parts * (5 if scatters else 4) * _product(call, attention.BACKWARD_ROWS),
        read=4 * cost.programs + units.active * (12 * parts + 2 * call.sizes.region * _row(call))
        + rows * (4 + 2 * _row(call) + 8 + scatters) + units.firsts * gradients
        + (units.active - units.firsts) * parts * 4,
        written=units.active * gradients + scattered * _row(call),
    )  # fmt: skip


def _add_extra_units(call: Call, launch: Launch) -> Cost:
    visits = launch.visits
    assert visits is not None
    if not visits.num_extra:
        return Cost()
    extras = visits.extra_first[launch.first : launch.first + launch.segments].diff(dim=1)
    cost = _programs(call.regions, launch.segments, call.sizes.parts)
    gradients = 2 * call.sizes.region * call.q.shape[3] * 4
    owners = int((extras > 0).sum())
    return cost + Cost(read=8 * cost.programs + (owners + int(extras.sum())) * gradients, written=owners * gradients)


def _tiles(call: Call, rows_of_product: int, dots: int) -> Cost:
    """What the tile kernels do for shared regions, and what they read to know their work; over all launches."""
    plan, sizes = call.plan, call.sizes
    row_parts = triton.cdiv(sizes.tile * sizes.rows, rows_of_product)
    shared = int(plan.counts.sum()) * row_parts
    lists = 4 * sizes.parts * (2 if sizes.tile > 1 else 1)
    flags = 0 if sizes.all_shared else _query_rows(call) * call.route.shape[2]
    return Cost(
        flops=shared * sizes.parts * dots * _product(call, rows_of_product),
        read=4 * plan.counts.numel() * row_parts + shared * (lists + 2 * sizes.region * _row(call)) + flags,
    )
