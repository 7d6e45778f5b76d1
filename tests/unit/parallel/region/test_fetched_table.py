"""Attention over all fetched regions in one call, in Triton's interpreter, against a call for each transfer."""

from __future__ import annotations

import torch
from torch import Tensor

from biroute.model.attention.grid import RegionGrid
from biroute.parallel.region.attention import attend_transfer, pair_rows, transfer_backward, upstream_rows
from biroute.parallel.region.costs import ExchangeCosts, RegionLayout
from biroute.parallel.region.fetched_table import FetchedTable
from biroute.parallel.region.plan import ExchangePlan, plan_exchange

LAYOUT = RegionLayout(num_regions=9, region_size=4, num_ranks=3)
GRID = RegionGrid(4, 2, False, 0.3, path="block_sparse", same_tokens=False)
COSTS = ExchangeCosts(region=20, queries=8, results=8)
RANK, BATCH, GROUPS, HEADS, SIZE = 1, 2, 2, 4, 8  # SIZE is that of a head


def planned() -> tuple[Tensor, ExchangePlan]:
    """A route of the middle rank of a bidirectional model; some transfers are shipped, and tables differ in size."""
    generator = torch.Generator().manual_seed(3)
    route = torch.full((BATCH, GROUPS, 6, 4), -1)
    for b, g, n in torch.cartesian_prod(torch.arange(BATCH), torch.arange(GROUPS), torch.arange(6)).tolist():
        chosen = torch.randperm(9, generator=generator)[: int(torch.randint(1, 5, (), generator=generator))]
        route[b, g, n, : len(chosen)] = chosen.sort().values
    route[0, 0, :, :] = torch.tensor([0, 3, 6, -1])  # every block asks each owner for one region: fetched
    route[0, 1, 1:, :] = torch.tensor([3, 4, 5, -1])  # of other ranks, only the first block asks: shipped
    route[0, 1, 0, :] = torch.tensor([0, 1, 2, 7])
    plan = plan_exchange(route, LAYOUT, RANK, COSTS)
    ships = {transfer.ship for transfer in plan.transfers}
    assert ships == {True, False} and len(set(plan.transfers.fetched_of_groups())) > 1
    shipped = [pair for transfer in plan.transfers if transfer.ship for pair in range(*transfer.pairs.indices(999))]
    assert plan.transfers.shipped.tolist() == shipped
    return route, plan


def test_one_call_gives_what_the_transfers_give() -> None:
    route, plan = planned()
    torch.manual_seed(0)
    q = torch.randn(BATCH, HEADS, 12, SIZE)
    fetched = torch.randn(sum(plan.transfers.fetched_regions()), 2, 4, SIZE)
    table = FetchedTable.of(route, LAYOUT, plan.transfers)
    assert table is not None and table.size == max(plan.transfers.fetched_of_groups())

    # Nothing was attended before, and rows whose choices are all shipped or own stay so.
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf)
    table.attend(out, lse, q, fetched, GRID)
    exact = RegionGrid(4, 2, False, 0.3, path="query_major", same_tokens=False)
    parts, rows = [], []
    slots = plan.transfers.pair_slots
    for transfer in plan.transfers:
        if not transfer.ship:
            queries = pair_rows(q, plan, exact, transfer.pairs)
            part = attend_transfer(queries, fetched[transfer.rows], slots[transfer.pairs], exact)
            parts.append(part)
            rows.append((transfer.group, plan.pair_block[transfer.pairs]))
    expected, expected_lse = torch.zeros(BATCH * GROUPS, 6, 2, 2, SIZE), torch.zeros(BATCH * GROUPS, 6, 2, 2)
    total = torch.zeros_like(expected_lse)
    for (part_out, part_lse), (group, blocks) in zip(parts, rows, strict=True):
        expected[group, blocks] += part_out * part_lse.exp()[..., None]
        total[group, blocks] += part_lse.exp()
    reached = total > 0
    assert not reached.all() and reached.any()
    expected = torch.where(reached[..., None], expected / total.clamp(min=1e-30)[..., None], 0.0)
    expected_lse = total.log()

    def by_block(x: Tensor) -> Tensor:
        return x.view(BATCH * GROUPS, 2, 6, 2, -1).transpose(1, 2).squeeze(-1)

    torch.testing.assert_close(by_block(out), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_block(lse), expected_lse, rtol=1e-4, atol=1e-5)

    # Before it, something was attended: the merge weighs both.
    again, again_lse = out.clone(), lse.clone()
    table.attend(again, again_lse, q, fetched, GRID)
    torch.testing.assert_close(again, out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again_lse, lse + torch.tensor(2.0).log(), rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_transfers() -> None:
    route, plan = planned()
    torch.manual_seed(0)
    q, dout = (torch.randn(BATCH, HEADS, 12, SIZE) for _ in range(2))
    fetched = torch.randn(sum(plan.transfers.fetched_regions()), 2, 4, SIZE)
    lse, delta = torch.rand(BATCH, HEADS, 12) + 2.0, torch.randn(BATCH, HEADS, 12)
    table = FetchedTable.of(route, LAYOUT, plan.transfers)
    assert table is not None
    dq, d_fetched = table.backward(q, fetched, dout, lse, delta, GRID)
    exact = RegionGrid(4, 2, False, 0.3, path="query_major", same_tokens=False)
    expected = torch.zeros(BATCH * GROUPS, 6, 2, 2, SIZE)
    for transfer in plan.transfers:
        if not transfer.ship:
            douts, offsets = upstream_rows(dout, lse, delta, plan, exact, transfer.pairs)
            queries, slots = pair_rows(q, plan, exact, transfer.pairs), plan.transfers.pair_slots[transfer.pairs]
            part, d_part = transfer_backward(queries, douts, offsets, fetched[transfer.rows], slots, exact)
            expected[transfer.group, plan.pair_block[transfer.pairs]] += part
            torch.testing.assert_close(d_fetched[transfer.rows], d_part, rtol=1e-4, atol=1e-5)
    found = dq.view(BATCH * GROUPS, 2, 6, 2, SIZE).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_no_table_where_nothing_is_fetched() -> None:
    route = torch.tensor([3, 4, -1, -1]).expand(1, 1, 6, 4)
    assert FetchedTable.of(route, LAYOUT, plan_exchange(route, LAYOUT, RANK, COSTS).transfers) is None
