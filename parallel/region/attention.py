"""Forward and backward of attention over own, fetched and shipped-to regions. See `region.py` for the idea.

Legend: B sequences, H query heads, G KV groups, g one of B * G, r heads of a group, S' tokens of this rank, D head
size, Lq tokens of a query block, N query blocks, L tokens of a region, R' regions of this rank, n visits and w
regions of one unit, V visits, W regions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from biroute.model.attention.partial import (
    Path,
    RegionGrid,
    attention_delta,
    partial_attention,
    partial_attention_backward,
    working_dtype,
)
from biroute.parallel.region.plan import ExchangeCosts, ExchangePlan, Units, plan_exchange

if TYPE_CHECKING:
    from biroute.parallel.region.shard import RegionExchange

# Expected query rows for each region of another rank from which one product per region beats one per query block.
ROWS_FOR_REGION_MAJOR = 64


def routed_attention(
    exchange: RegionExchange, q: Tensor, k: Tensor, v: Tensor, index: Tensor, grid: RegionGrid, layer: int
) -> Tensor:
    """See `RegionExchange.routed_attention`. Collective."""
    return _RoutedAttention.apply(q.contiguous(), k.contiguous(), v.contiguous(), index, grid, exchange, layer)


class _RoutedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: Tensor,
        grid: RegionGrid,
        exchange: RegionExchange,
        layer: int,
    ) -> Tensor:
        heads, blocks, topk = q.shape[1] // k.shape[1], index.shape[2], index.shape[3]
        costs = ExchangeCosts.of(
            region_size=grid.region_size,
            query_block_size=grid.query_block_size,
            heads_per_group=heads,
            head_size=q.shape[3],
            element_size=q.element_size(),
        )
        plan = plan_exchange(index, exchange.layout, exchange.rank, costs, exchange.way)
        exchange.record_plan(layer, plan, blocks=blocks, topk=topk, causal=grid.causal)
        service = exchange.request(plan, layer)
        wants, gives = plan.units, service
        regions = region_table(k, v, grid.region_size)
        queries = visit_rows(q, k.shape[1], grid.query_block_size, plan)

        # Both payloads travel while the own regions are attended.
        ship_V = wants.visit_ships()
        keys = exchange.start(
            layer, "keys", regions[gives.table_rows(exchange.layout.regions_per_rank)],
            gives.fetched_regions(), wants.fetched_regions(),
        )  # fmt: skip
        shipped = exchange.start(layer, "queries", queries[ship_V], wants.shipped_visits(), gives.shipped_visits())
        own_index = own_regions(index, exchange)
        out, lse = partial_attention(q, k, v, own_index, grid, out_dtype=working_dtype(q))

        units = unit_grid(grid, blocks, heads, topk, exchange.layout.num_regions)
        visiting = shipped.wait()
        results = exchange.start(
            layer, "results",
            serve_forward(visiting, regions, gives, units, exchange.layout.regions_per_rank, q.dtype),
            gives.shipped_visits(), wants.shipped_visits(),
        )  # fmt: skip
        fetched = keys.wait()
        merge_units(out, lse, plan, queries, fetched, results, units, k.shape[1])
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, own_index, out, lse, fetched, visiting)
        ctx.plan, ctx.service, ctx.grid, ctx.units = plan, service, grid, units
        ctx.exchange, ctx.layer = exchange, layer
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, own_index, out, lse, fetched, visiting = ctx.saved_tensors
        exchange, layer, plan, gives = ctx.exchange, ctx.layer, ctx.plan, ctx.service
        wants, groups, lq = plan.units, k.shape[1], ctx.grid.query_block_size
        dout = dout.contiguous()
        delta = attention_delta(out, dout)
        ship_V = wants.visit_ships()
        douts = visit_rows(dout, groups, lq, plan)
        levels = torch.stack(
            [visit_rows(x[..., None], groups, lq, plan).squeeze(-1) for x in (lse, delta)], -1
        )  # [V, r, Lq, 2]
        upstream = exchange.start(
            layer, "gradients", pack(douts[ship_V], levels[ship_V]), wants.shipped_visits(), gives.shipped_visits()
        )
        queries = visit_rows(q, groups, lq, plan)
        dq_rows, d_fetched = fetched_backward(queries, douts, levels, fetched, wants, ctx.units)
        keys = exchange.start(layer, "gradients", d_fetched, wants.fetched_regions(), gives.fetched_regions())
        dq, dk, dv = partial_attention_backward(
            q, k, v, own_index, ctx.grid, dout=dout, lse=lse, delta=delta, out_dtype=working_dtype(q)
        )
        regions = region_table(k, v, ctx.grid.region_size)
        dq_visiting, d_regions = serve_backward(
            visiting, upstream.wait(), regions, gives, ctx.units, exchange.layout.regions_per_rank, q.dtype
        )
        returned = exchange.start(layer, "gradients", dq_visiting, gives.shipped_visits(), wants.shipped_visits())
        received = keys.wait()
        dq_rows[ship_V] = returned.wait()
        add_visit_rows(dq, dq_rows, plan, groups, lq)
        d_table = torch.stack((dk, dv)).unflatten(3, (-1, ctx.grid.region_size)).flatten(1, 3)  # [2, B*G*R', L, D]
        add_regions(d_table, d_regions, received, gives, exchange.layout.regions_per_rank)
        dk, dv = d_table.view(2, *k.shape)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def unit_grid(grid: RegionGrid, num_blocks: int, heads: int, topk: int, num_regions: int) -> RegionGrid:
    """How units are computed: by a rule of sizes alone, so that no token's choice changes another one's bits."""
    rows = heads * grid.query_block_size
    expected_rows = num_blocks * rows * topk / num_regions
    region_major = rows < grid.region_size and expected_rows >= ROWS_FOR_REGION_MAJOR
    path: Path = "region_major" if region_major else "query_major"
    return replace(grid, causal=False, same_tokens=False, path=path)


def own_regions(index: Tensor, exchange: RegionExchange) -> Tensor:
    """The part of a route that lies on this rank, in its own numbers: ascending, -1 last."""
    count = exchange.layout.regions_per_rank
    own = index - exchange.rank * count
    own = own.masked_fill((index < 0) | (own < 0) | (own >= count), count).sort(-1).values
    return own.masked_fill_(own == count, -1)


def region_table(k: Tensor, v: Tensor, region_size: int) -> Tensor:
    """k, v [B, G, S', D] -> keys and values by region [B * G * R', 2, L, D]."""
    return torch.stack([x.unflatten(2, (-1, region_size)).flatten(0, 2) for x in (k, v)], 1)


def visit_rows(x: Tensor, groups: int, query_block_size: int, plan: ExchangePlan) -> Tensor:
    """x [B, H, S', C] -> what belongs to the query blocks of the plan's visits [V, r, Lq, C]."""
    units = plan.units
    x_grNMC = x.unflatten(1, (groups, -1)).flatten(0, 1).unflatten(2, (-1, query_block_size))
    return x_grNMC.transpose(1, 2)[units.group.repeat_interleave(units.visits), plan.visit_block]


def add_visit_rows(x: Tensor, rows: Tensor, plan: ExchangePlan, groups: int, query_block_size: int) -> None:
    """Add rows [V, r, Lq, C] to x [B, H, S', C], unit after unit."""
    x_gNrMC = x.unflatten(1, (groups, -1)).flatten(0, 1).unflatten(2, (-1, query_block_size)).transpose(1, 2)
    for unit in plan.units:
        # The visits of a unit are different blocks, so this adds each row once.
        x_gNrMC[unit.group, plan.visit_block[unit.visits]] += rows[unit.visits]


def _queries(rows: Tensor) -> Tensor:
    """[n, r, Lq, C] -> [1, r, n * Lq, C]."""
    return rows.transpose(0, 1).flatten(1, 2)[None]


def _rows(x: Tensor, count: int) -> Tensor:
    """[1, r, n * Lq, C] -> [n, r, Lq, C]."""
    return x[0].unflatten(1, (count, -1)).transpose(0, 1)


def _keys(regions: Tensor) -> tuple[Tensor, Tensor]:
    """[w, 2, L, D] -> keys and values, each [1, 1, w * L, D]."""
    k, v = regions.unbind(1)
    return k.flatten(0, 1)[None, None], v.flatten(0, 1)[None, None]


def pack(rows: Tensor, extra: Tensor) -> Tensor:
    """[n, r, Lq, D] and [n, r, Lq, c] in another precision -> one row of bytes for each query row."""
    return torch.cat((rows.contiguous().view(torch.uint8), extra.contiguous().view(torch.uint8)), -1)


def unpack(packed: Tensor, dtype: torch.dtype, width: int) -> tuple[Tensor, Tensor]:
    """The inverse of `pack` for rows of `width` elements of `dtype`."""
    size = width * dtype.itemsize
    return packed[..., :size].contiguous().view(dtype), packed[..., size:].contiguous().view(working(dtype))


def working(dtype: torch.dtype) -> torch.dtype:
    """Precision of log-sum-exps beside tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attend_unit(queries: Tensor, regions: Tensor, slots: Tensor, units: RegionGrid) -> tuple[Tensor, Tensor]:
    """queries [n, r, Lq, D], regions [w, 2, L, D], slots [n, T] -> out [n, r, Lq, D] and lse [n, r, Lq]."""
    k, v = _keys(regions)
    out, lse = partial_attention(_queries(queries), k, v, slots[None, None], units)
    return _rows(out, len(queries)), _rows(lse[..., None], len(queries)).squeeze(-1)


def unit_backward(
    queries: Tensor, dout: Tensor, levels: Tensor, regions: Tensor, slots: Tensor, units: RegionGrid
) -> tuple[Tensor, Tensor]:
    """levels [n, r, Lq, 2]: log-sum-exp and delta of the whole route -> dq [n, r, Lq, D], d_regions [w, 2, L, D]."""
    k, v = _keys(regions)
    lse, delta = (_queries(level[..., None]).squeeze(-1).contiguous() for level in levels.unbind(-1))
    dq, dk, dv = partial_attention_backward(
        _queries(queries), k, v, slots[None, None], units,
        dout=_queries(dout), lse=lse, delta=delta, out_dtype=working_dtype(queries),
    )  # fmt: skip
    d_regions = torch.stack([d[0, 0].unflatten(0, (len(regions), -1)) for d in (dk, dv)], 1)
    return _rows(dq, len(queries)), d_regions


def merge_units(
    out: Tensor, lse: Tensor, plan: ExchangePlan, queries: Tensor, fetched: Tensor, results: Any, units: RegionGrid,
    groups: int,
) -> None:  # fmt: skip
    """Merge every unit into out [B, H, S', D] and lse [B, H, S'], which hold the own regions' part."""
    lq, head_size = units.query_block_size, out.shape[-1]
    out_gNrMD = out.unflatten(1, (groups, -1)).flatten(0, 1).unflatten(2, (-1, lq)).transpose(1, 2)
    lse_gNrM = lse.unflatten(1, (groups, -1)).flatten(0, 1).unflatten(2, (-1, lq)).transpose(1, 2)
    slots, parts, returned = plan.units.visit_slots, {}, None
    for number, unit in enumerate(plan.units):  # compute what was fetched while the results travel
        if not unit.ship:
            parts[number] = attend_unit(queries[unit.visits], fetched[unit.rows], slots[unit.visits], units)
    returned = unpack(results.wait(), queries.dtype, head_size)
    for number, unit in enumerate(plan.units):
        part_out, part_lse = (
            (returned[0][unit.rows], returned[1][unit.rows].squeeze(-1)) if unit.ship else parts.pop(number)
        )
        blocks = plan.visit_block[unit.visits]
        before = lse_gNrM[unit.group, blocks]
        # exp and log: logaddexp and exp2 round an element differently by its place in a tensor.
        highest = torch.maximum(before, part_lse)
        weight, part_weight = ((x - highest).exp_() for x in (before, part_lse))
        total = weight + part_weight
        merged = out_gNrMD[unit.group, blocks] * (weight / total)[..., None]
        merged += part_out.to(merged.dtype) * (part_weight / total)[..., None]
        out_gNrMD[unit.group, blocks] = merged
        lse_gNrM[unit.group, blocks] = highest + total.log_()


def serve_forward(
    visiting: Tensor, regions: Tensor, gives: Units, units: RegionGrid, regions_per_rank: int, dtype: torch.dtype
) -> Tensor:
    """Partial outputs and log-sum-exps of the queries that came, as packed rows."""
    outs, lses = [visiting[:0]], [visiting[:0, ..., 0].to(working(dtype))]
    for unit in gives:
        if unit.ship:
            rows = unit.group * regions_per_rank + gives.wanted_region[unit.wanted]
            out, lse = attend_unit(visiting[unit.rows], regions[rows], gives.visit_slots[unit.visits], units)
            outs.append(out)
            lses.append(lse)
    return pack(torch.cat(outs), torch.cat(lses)[..., None])


def serve_backward(
    visiting: Tensor, upstream: Tensor, regions: Tensor, gives: Units, units: RegionGrid, regions_per_rank: int,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Gradients of the queries that came [V, r, Lq, D], and of the regions of each shipped unit, in their order."""
    douts, levels = unpack(upstream, dtype, visiting.shape[-1])
    levels = levels.unflatten(-1, (2,))
    dqs, d_regions = [visiting[:0].to(working(dtype))], []
    for unit in gives:
        if unit.ship:
            rows = unit.group * regions_per_rank + gives.wanted_region[unit.wanted]
            dq, d_unit = unit_backward(
                visiting[unit.rows], douts[unit.rows], levels[unit.rows], regions[rows],
                gives.visit_slots[unit.visits], units,
            )  # fmt: skip
            dqs.append(dq)
            d_regions.append(d_unit)
    return torch.cat(dqs), d_regions


def fetched_backward(
    queries: Tensor, douts: Tensor, levels: Tensor, fetched: Tensor, wants: Units, units: RegionGrid
) -> tuple[Tensor, Tensor]:
    """Gradients of all visits' queries [V, r, Lq, D] (of shipped ones not yet) and of the fetched regions."""
    dq = torch.zeros_like(queries, dtype=working_dtype(queries))
    d_fetched = torch.zeros_like(fetched, dtype=working_dtype(queries))
    for unit in wants:
        if not unit.ship:
            at = unit.visits
            dq[at], d_fetched[unit.rows] = unit_backward(
                queries[at], douts[at], levels[at], fetched[unit.rows], wants.visit_slots[at], units
            )
    return dq, d_fetched


def add_regions(d_table: Tensor, served: list[Tensor], received: Tensor, gives: Units, regions_per_rank: int) -> None:
    """Add the requesters' units to the owner's gradients [2, B * G * R', L, D], in the order of the units."""
    shipped = iter(served)
    for unit in gives:
        part = next(shipped) if unit.ship else received[unit.rows]
        d_table[:, unit.group * regions_per_rank + gives.wanted_region[unit.wanted]] += part.transpose(0, 1)
