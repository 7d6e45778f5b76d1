"""Forward and backward of attention over own, fetched and shipped-to regions. See `shard.py` for the idea.

Shapes: B sequences, H query heads, G key/value heads, g one of B * G, r = H / G, S tokens of this rank, D head size,
Lq (as a suffix M) tokens of a query block, N query blocks, L tokens of a region, R regions of this rank, U pairs (a
query block and an owner of whose regions it chose some), W requested regions, K slots of a route; n pairs and w
regions of one transfer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from biroute.model.attention.grid import AttentionPath, RegionGrid, uses_kernels
from biroute.model.attention.partial import (
    attention_delta,
    merge_weights,
    partial_attention,
    partial_attention_backward,
    working_dtype,
)
from biroute.parallel.region.costs import Baselines, ExchangeCosts, RegionLayout
from biroute.parallel.region.fetched_table import FetchedTable
from biroute.parallel.region.plan import ExchangePlan, Way, plan_exchange
from biroute.parallel.region.transfers import Transfers
from biroute.parallel.region.transport import Pending, Transport

# Expected query rows for each region of another rank from which one product per region beats one per query block.
ROWS_FOR_REGION_MAJOR = 64


@dataclass(frozen=True)
class Exchange:
    """What attention over sharded regions needs besides tensors."""

    layout: RegionLayout
    transport: Transport
    way: Way
    grid: RegionGrid
    layer: int  # labels what is counted


class RoutedAttention(torch.autograd.Function):
    """Attention of this rank's queries over the regions of their route, on whichever rank those are. Collective."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, route: Tensor, exchange: Exchange) -> Tensor:
        """Attend: q [B, H, S, D], k and v [B, G, S, D], all contiguous, route [B, G, N, K] -> [B, H, S, D]."""
        layout, transport, way = exchange.layout, exchange.transport, exchange.way
        grid, layer = exchange.grid, exchange.layer
        heads, blocks, topk = q.shape[1] // k.shape[1], route.shape[2], route.shape[3]
        costs = ExchangeCosts.of(
            region_size=grid.region_size,
            query_block_size=grid.query_block_size,
            heads_per_group=heads,
            head_size=q.shape[3],
            element_size=q.element_size(),
        )
        plan = plan_exchange(route, layout, transport.rank, costs, way)
        baselines = Baselines.of(
            layout,
            transport.rank,
            costs,
            groups=plan.transfers.num_groups,
            blocks=blocks,
            topk=topk,
            causal=grid.causal,
        )
        transport.log.add_plan(layer, plan, baselines)
        requests, served = plan.transfers, transport.request(plan.transfers, topk, layer)
        regions = region_table(k, v, grid.region_size)

        # Both payloads travel while the own regions are attended.
        keys = transport.start(
            layer, "keys", regions[served.table_rows(layout.regions_per_rank)],
            served.fetched_regions(), requests.fetched_regions(),
        )  # fmt: skip
        shipped = transport.start(
            layer, "queries", pair_rows(q, plan, grid, requests.shipped),
            requests.shipped_pairs(), served.shipped_pairs(),
        )  # fmt: skip
        own_route = own_regions(route, layout, transport.rank)
        out, lse = partial_attention(q, k, v, own_route, grid, out_dtype=working_dtype(q))

        rows = heads * grid.query_block_size
        part_grid = part_grid_of(grid, q, rows, blocks * rows * topk / layout.num_regions)
        arrived = shipped.wait()
        results = transport.start(
            layer, "results",
            serve_forward(arrived, regions, served, part_grid, layout.regions_per_rank, q.dtype),
            served.shipped_pairs(), requests.shipped_pairs(),
        )  # fmt: skip
        fetched = keys.wait()
        table = FetchedTable.of(route, layout, requests) if uses_kernels(part_grid, q) else None
        if table is not None:
            table.attend(out, lse, q, fetched, part_grid)
        merge_transfers(out, lse, plan, q, fetched, results, part_grid)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, own_route, out, lse, fetched, arrived)
        ctx.plan, ctx.served, ctx.table, ctx.part_grid, ctx.exchange = plan, served, table, part_grid, exchange
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, own_route, out, lse, fetched, arrived = ctx.saved_tensors
        plan, served, layout, transport = ctx.plan, ctx.served, ctx.exchange.layout, ctx.exchange.transport
        grid, layer, requests = ctx.exchange.grid, ctx.exchange.layer, plan.transfers
        dout = dout.contiguous()
        delta = attention_delta(out, dout)
        upstream = transport.start(
            layer,
            "gradients",
            pack(*upstream_rows(dout, lse, delta, plan, grid, requests.shipped)),
            requests.shipped_pairs(),
            served.shipped_pairs(),
        )
        if ctx.table is not None:
            of_fetched, d_fetched = ctx.table.backward(q, fetched, dout, lse, delta, ctx.part_grid)
        else:
            of_fetched, d_fetched = fetched_backward(q, dout, lse, delta, fetched, plan, ctx.part_grid)
        keys = transport.start(layer, "gradients", d_fetched, requests.fetched_regions(), served.fetched_regions())
        dq, dk, dv = partial_attention_backward(
            q, k, v, own_route, grid, dout=dout, lse=lse, delta=delta, out_dtype=working_dtype(q)
        )
        regions = region_table(k, v, grid.region_size)
        dq_arrived, d_regions = serve_backward(
            arrived, upstream.wait(), regions, served, ctx.part_grid, layout.regions_per_rank, q.dtype
        )
        returned = transport.start(layer, "gradients", dq_arrived, served.shipped_pairs(), requests.shipped_pairs())
        received = keys.wait()
        add_queries(dq, of_fetched, returned.wait(), plan, grid)
        d_table = torch.stack((dk, dv)).unflatten(3, (-1, grid.region_size)).flatten(1, 3)  # [2, B*G*R, L, D]
        add_regions(d_table, d_regions, received, served, layout.regions_per_rank)
        dk, dv = d_table.view(2, *k.shape)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def part_grid_of(grid: RegionGrid, q: Tensor, rows: int, expected_rows: float) -> RegionGrid:
    """Choose how transfers are computed, from sizes alone, so that no token's choice changes another one's bits.

    Args:
        grid: sizes of the whole attention.
        q: this rank's queries.
        rows: query rows of a block.
        expected_rows: expected number of query rows that choose a given region.

    Returns:
        The grid of a transfer: not causal, because only earlier regions are requested.
    """
    if uses_kernels(grid, q):
        return replace(grid, causal=False, same_tokens=False)
    region_major = rows < grid.region_size and expected_rows >= ROWS_FOR_REGION_MAJOR
    path: AttentionPath = "region_major" if region_major else "query_major"
    return replace(grid, causal=False, same_tokens=False, path=path)


def own_regions(route: Tensor, layout: RegionLayout, rank: int) -> Tensor:
    """Return the part of a route that is on this rank, numbered on this rank: ascending, -1 last."""
    count = layout.regions_per_rank
    own = route - rank * count
    own = own.masked_fill((route < 0) | (own < 0) | (own >= count), count).sort(-1).values
    return own.masked_fill_(own == count, -1)


def region_table(k: Tensor, v: Tensor, region_size: int) -> Tensor:
    """Arrange keys and values by region: k, v [B, G, S, D] -> [B * G * R, 2, L, D]."""
    return torch.stack([x.unflatten(2, (-1, region_size)).flatten(0, 2) for x in (k, v)], 1)


def pair_rows(x: Tensor, plan: ExchangePlan, grid: RegionGrid, which: slice | Tensor) -> Tensor:
    """Select the query blocks of some of the plan's pairs: x [B, H, S, C] -> [n, r, Lq, C]."""
    return _by_block(x, plan, grid)[plan.transfers.group_of_pair[which], plan.pair_block[which]]


def upstream_rows(
    dout: Tensor, lse: Tensor, delta: Tensor, plan: ExchangePlan, grid: RegionGrid, which: slice | Tensor
) -> tuple[Tensor, Tensor]:
    """Select what backward needs of some pairs: dout [n, r, Lq, D], and log-sum-exp and delta [n, r, Lq, 2]."""
    offsets = [pair_rows(x[..., None], plan, grid, which).squeeze(-1) for x in (lse, delta)]
    return pair_rows(dout, plan, grid, which), torch.stack(offsets, -1)


def _by_block(x: Tensor, plan: ExchangePlan, grid: RegionGrid) -> Tensor:
    """View x [B, H, S, C] as [B * G, N, r, Lq, C]."""
    groups = plan.transfers.num_groups // x.shape[0]
    x_grNMC = x.unflatten(1, (groups, -1)).flatten(0, 1).unflatten(2, (-1, grid.query_block_size))
    return x_grNMC.transpose(1, 2)


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
    """Pack [n, r, Lq, D] and [n, r, Lq, c] of another precision into one row of bytes for each query row."""
    return torch.cat((rows.contiguous().view(torch.uint8), extra.contiguous().view(torch.uint8)), -1)


def unpack(packed: Tensor, dtype: torch.dtype, width: int) -> tuple[Tensor, Tensor]:
    """Invert `pack` for rows of `width` elements of `dtype`."""
    size = width * dtype.itemsize
    return packed[..., :size].contiguous().view(dtype), packed[..., size:].contiguous().view(working(dtype))


def working(dtype: torch.dtype) -> torch.dtype:
    """Return the precision of the log-sum-exps that belong to tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attend_transfer(queries: Tensor, regions: Tensor, slots: Tensor, part_grid: RegionGrid) -> tuple[Tensor, Tensor]:
    """Attend: queries [n, r, Lq, D], regions [w, 2, L, D], slots [n, K] -> out [n, r, Lq, D], lse [n, r, Lq]."""
    k, v = _keys(regions)
    out, lse = partial_attention(_queries(queries), k, v, slots[None, None], part_grid)
    return _rows(out, len(queries)), _rows(lse[..., None], len(queries)).squeeze(-1)


def transfer_backward(
    queries: Tensor, dout: Tensor, offsets: Tensor, regions: Tensor, slots: Tensor, part_grid: RegionGrid
) -> tuple[Tensor, Tensor]:
    """Compute dq [n, r, Lq, D] and d_regions [w, 2, L, D].

    `offsets` [n, r, Lq, 2] are log-sum-exp and delta of the whole route.
    """
    k, v = _keys(regions)
    lse, delta = (_queries(offset[..., None]).squeeze(-1).contiguous() for offset in offsets.unbind(-1))
    dq, dk, dv = partial_attention_backward(
        _queries(queries), k, v, slots[None, None], part_grid,
        dout=_queries(dout), lse=lse, delta=delta, out_dtype=working_dtype(queries),
    )  # fmt: skip
    d_regions = torch.stack([d[0, 0].unflatten(0, (len(regions), -1)) for d in (dk, dv)], 1)
    return _rows(dq, len(queries)), d_regions


def merge_transfers(
    out: Tensor, lse: Tensor, plan: ExchangePlan, q: Tensor, fetched: Tensor, results: Pending, part_grid: RegionGrid
) -> None:
    """Merge transfers into out [B, H, S, D] and lse [B, H, S], which contain the part of the own regions.

    The kernels have attended to all that was fetched; then what was shipped is left.
    """
    out_gNrMD, lse_gNrM = _by_block(out, plan, part_grid), _by_block(lse[..., None], plan, part_grid)[..., 0]
    slots, parts = plan.transfers.pair_slots, {}
    attended = uses_kernels(part_grid, q)
    for number, transfer in enumerate(plan.transfers):  # compute what was fetched while the results travel
        if not transfer.ship and not attended:
            queries = pair_rows(q, plan, part_grid, transfer.pairs)
            parts[number] = attend_transfer(queries, fetched[transfer.rows], slots[transfer.pairs], part_grid)
    returned = unpack(results.wait(), q.dtype, out.shape[-1])
    for number, transfer in enumerate(plan.transfers):
        if transfer.ship:
            part_out, part_lse = returned[0][transfer.rows], returned[1][transfer.rows].squeeze(-1)
        elif attended:
            continue
        else:
            part_out, part_lse = parts.pop(number)
        blocks = plan.pair_block[transfer.pairs]
        weight, part_weight, merged_lse = merge_weights(lse_gNrM[transfer.group, blocks], part_lse)
        merged = out_gNrMD[transfer.group, blocks] * weight[..., None]
        merged += part_out.to(merged.dtype) * part_weight[..., None]
        out_gNrMD[transfer.group, blocks] = merged
        lse_gNrM[transfer.group, blocks] = merged_lse


def serve_forward(
    arrived: Tensor,
    regions: Tensor,
    served: Transfers,
    part_grid: RegionGrid,
    regions_per_rank: int,
    dtype: torch.dtype,
) -> Tensor:
    """Compute partial outputs and log-sum-exps of the queries that arrived, as packed rows."""
    outs, lses = [arrived[:0]], [arrived[:0, ..., 0].to(working(dtype))]
    for transfer in served:
        if transfer.ship:
            rows = transfer.group * regions_per_rank + served.requested_region[transfer.requested]
            out, lse = attend_transfer(
                arrived[transfer.rows], regions[rows], served.pair_slots[transfer.pairs], part_grid
            )
            outs.append(out)
            lses.append(lse)
    return pack(torch.cat(outs), torch.cat(lses)[..., None])


def serve_backward(
    arrived: Tensor, upstream: Tensor, regions: Tensor, served: Transfers, part_grid: RegionGrid,
    regions_per_rank: int, dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Compute the gradients of the queries that arrived, [U, r, Lq, D], and of each shipped transfer's regions."""
    douts, offsets = unpack(upstream, dtype, arrived.shape[-1])
    offsets = offsets.unflatten(-1, (2,))
    dqs, d_regions = [arrived[:0].to(working(dtype))], []
    for transfer in served:
        if transfer.ship:
            rows = transfer.group * regions_per_rank + served.requested_region[transfer.requested]
            dq, d_transfer = transfer_backward(
                arrived[transfer.rows], douts[transfer.rows], offsets[transfer.rows], regions[rows],
                served.pair_slots[transfer.pairs], part_grid,
            )  # fmt: skip
            dqs.append(dq)
            d_regions.append(d_transfer)
    return torch.cat(dqs), d_regions


def fetched_backward(
    q: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, fetched: Tensor, plan: ExchangePlan, part_grid: RegionGrid
) -> tuple[dict[int, Tensor], Tensor]:
    """Compute the gradients of the fetched regions, and by number of transfer those of queries [n, r, Lq, D]."""
    dq: dict[int, Tensor] = {}
    d_fetched = torch.zeros_like(fetched, dtype=working_dtype(q))
    for number, transfer in enumerate(plan.transfers):
        if not transfer.ship:
            queries = pair_rows(q, plan, part_grid, transfer.pairs)
            douts, offsets = upstream_rows(dout, lse, delta, plan, part_grid, transfer.pairs)
            slots = plan.transfers.pair_slots[transfer.pairs]
            dq[number], d_fetched[transfer.rows] = transfer_backward(
                queries, douts, offsets, fetched[transfer.rows], slots, part_grid
            )
    return dq, d_fetched


def add_queries(
    dq: Tensor, of_fetched: Tensor | dict[int, Tensor], returned: Tensor, plan: ExchangePlan, grid: RegionGrid
) -> None:
    """Add to dq [B, H, S, D] what fetched regions gave, of all queries or by transfer, and what came back."""
    if isinstance(of_fetched, Tensor):
        dq += of_fetched
        of_fetched = {}
    dq_gNrMD = _by_block(dq, plan, grid)
    for number, transfer in enumerate(plan.transfers):
        rows = returned[transfer.rows] if transfer.ship else of_fetched.get(number)
        if rows is not None:  # the pairs of a transfer are different blocks, so this adds each row once
            dq_gNrMD[transfer.group, plan.pair_block[transfer.pairs]] += rows


def add_regions(
    d_table: Tensor, of_shipped: list[Tensor], received: Tensor, served: Transfers, regions_per_rank: int
) -> None:
    """Add the gradients of all transfers to the owner's, [2, B * G * R, L, D], in the order of the other ranks.

    What one rank requests is of different heads, or different regions of a head: each row is added to once for it.
    """
    shipped = iter(of_shipped)
    of_peers = served.fetched_regions()
    rows, parts = served.table_rows(regions_per_rank).split(of_peers), received.split(of_peers)
    for peer, transfers in groupby(zip(served.sizes, served, strict=True), key=lambda pair: pair[0].peer):
        if of_peers[peer]:
            d_table[:, rows[peer]] += parts[peer].transpose(0, 1)
        for _, transfer in transfers:
            if transfer.ship:
                at = transfer.group * regions_per_rank + served.requested_region[transfer.requested]
                d_table[:, at] += next(shipped).transpose(0, 1)
