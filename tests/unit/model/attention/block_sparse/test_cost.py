"""The formulas of `cost.py` against counting: every product, load and store that the interpreter carries out."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceScanOpInterface

from biroute.model.attention.block_sparse import attention as kernels
from biroute.model.attention.block_sparse.cost import (
    Cost,
    backward_cost,
    descriptors_cost,
    forward_cost,
    needed_flops,
    router_cost,
)
from biroute.model.attention.block_sparse.descriptors import mean_descriptors
from biroute.model.attention.block_sparse.router import fused_route
from biroute.model.attention.grid import RegionGrid
from biroute.model.attention.rule import RouteRule


class Counted:
    """What the interpreter did, by kernel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.costs: dict[str, Counter[str]] = {}
        execute, dot = GridExecutor.__call__, InterpreterBuilder.create_dot
        atomic, scan = InterpreterBuilder.create_atomic_rmw, ReduceScanOpInterface.apply
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.now = self.costs.setdefault(executor.fn.__name__, Counter())
            self.now["launches"] += 1
            self.now["programs"] += int(np.prod(executor.grid))
            return execute(executor, *args, **kwargs)

        def counted_dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
            self.now["flops"] += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
            return dot(builder, a, b, *rest)

        def size(pointers: Any, mask: Any) -> int:
            element = max(8, pointers.get_element_ty().primitive_bitwidth)  # a bool takes a byte
            return int(np.broadcast_to(mask.data, pointers.data.shape).sum()) * element // 8

        def counted_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            self.now["read"] += size(pointers, mask)
            return load(builder, pointers, mask, *rest)

        def counted_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.now["written"] += size(pointers, mask)
            return store(builder, pointers, value, mask, *rest)

        def counted_atomic(builder: Any, kind: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.now["read"] += size(pointers, mask)
            self.now["written"] += size(pointers, mask)
            return atomic(builder, kind, pointers, value, mask, *rest)

        def counted_scan(operation: Any, values: Any) -> Any:
            if self.now is self.costs.get("route_blocks") and not isinstance(values, tuple):
                self.now["scanned"] += values.handle.data.size
            return scan(operation, values)

        monkeypatch.setattr(ReduceScanOpInterface, "apply", counted_scan)
        monkeypatch.setattr(GridExecutor, "__call__", launch)
        monkeypatch.setattr(InterpreterBuilder, "create_atomic_rmw", counted_atomic)
        monkeypatch.setattr(InterpreterBuilder, "create_dot", counted_dot)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)

    def all(self) -> dict[str, Cost]:
        return {name: Cost(**counts) for name, counts in self.costs.items()}


# Query heads, tokens, head size, region size, query block, slots, causal, memory for partial results, rows of a unit.
CASES = {
    "shared and scattered, many segments and units": (4, 80, 32, 16, 1, 3, True, 60_000, 16),
    "one route a region": (4, 64, 32, 32, 32, 2, True, 1 << 29, 64),
    "regions in unequal parts, sizes that fill no tile": (1, 144, 200, 48, 1, 2, True, 1 << 29, 1024),
    "both directions, blocks of several tokens": (3, 48, 40, 24, 2, 2, False, 1 << 29, 64),
}


@pytest.mark.parametrize("name", CASES)
def test_the_cost_is_what_the_interpreter_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heads, tokens, head_size, region, block, topk, causal, scratch, unit_rows = CASES[name]
    monkeypatch.setattr(kernels, "SCRATCH_BYTES", scratch)
    monkeypatch.setattr(kernels, "SHORT", 0)
    for bound in ("FORWARD_UNIT_ROWS", "BACKWARD_UNIT_ROWS", "BLOCK_UNIT_ROWS"):
        monkeypatch.setattr(kernels, bound, unit_rows)
    groups = 2
    q, dout = (torch.randn(1, groups * heads, tokens, head_size).half() for _ in range(2))
    k, v = (torch.randn(1, groups, tokens, head_size).half() for _ in range(2))
    rule = RouteRule(region, block, topk, causal, descriptors_per_region=2)
    grid = RegionGrid(region, block, causal, head_size**-0.5)
    counted = Counted(monkeypatch)
    queries = mean_descriptors(q, groups, block, block, largest=1.0)
    route = fused_route(queries, torch.randn(1, groups, tokens // region * 2, head_size), rule, precision="ieee")
    out, lse = kernels.sparse_attention(q, k, v, route, grid)
    delta = kernels.output_delta(out, dout)
    kernels.sparse_attention_backward(q, k, v, route, grid, dout=dout, lse=lse, delta=delta)
    found = counted.all()
    call = kernels.Call.of(*(x.to("meta") for x in (q, k, v)), route, grid)
    router = router_cost(route, rule, head_size=head_size, element_size=4, num_regions=tokens // region)
    expected = {"route_blocks": router, "mean_rows": descriptors_cost(q, groups, block, block, 4)}
    for direction in (forward_cost(call), backward_cost(call)):  # each makes a plan
        for kernel, cost in direction.items():
            expected[kernel] = expected.get(kernel, Cost()) + cost
    assert set(found) == set(expected)
    for kernel, cost in expected.items():
        assert found[kernel] == cost, kernel


def test_finalists_cost_what_the_interpreter_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is known before: how many of them there may be."""
    rule = RouteRule(1, 1, 4, True)
    counted = Counted(monkeypatch)
    route = fused_route(torch.randn(1, 1, 128, 16), torch.randn(1, 1, 128, 16), rule, precision="ieee")
    found = counted.all()["route_blocks"]
    most = router_cost(route, rule, head_size=16, element_size=4, num_regions=128)
    fewest = 8 * int((route >= 0).sum())  # a register each way for the region and its affinity
    fixed = most.read - 8 * 128 * 4 * 4, most.written - 8 * 128 * 4 * 4
    assert found.scanned == most.scanned
    assert fixed[0] + fewest <= found.read < most.read
    assert fixed[1] + fewest <= found.written < most.written


def test_what_a_route_needs_is_what_a_mask_counts() -> None:
    heads, tokens, region, block = 2, 48, 8, 4
    route = torch.tensor([[0, -1, -1], [0, 1, -1]]).repeat_interleave(2, 0)
    route = torch.cat([route, torch.tensor([[0, 2, -1]] * 2 + [[1, 2, 3]] * 2 + [[0, 3, 4]] * 2 + [[2, 4, 5]] * 2)])
    grid = RegionGrid(region, block, True, 1.0)
    q, k = (torch.empty(1, n, tokens, 16, device="meta") for n in (heads, 1))
    call = kernels.Call.of(q, k, k, route[None, None], grid)
    seen = sum(
        token >= key
        for token in range(tokens)
        for chosen in route[token // block].tolist()
        if chosen >= 0
        for key in range(chosen * region, (chosen + 1) * region)
    )
    assert needed_flops(call) == (4 * seen * heads * 16, 10 * seen * heads * 16)
