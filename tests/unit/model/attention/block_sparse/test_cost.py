"""The formulas of `cost.py` against counting: every product, load and store that the interpreter carries out."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from biroute.model.attention.block_sparse import attention as kernels
from biroute.model.attention.block_sparse.cost import (
    Cost,
    backward_cost,
    forward_cost,
    needed_flops,
    router_cost,
)
from biroute.model.attention.block_sparse.router import fused_route
from biroute.model.attention.grid import RegionGrid
from biroute.model.attention.rule import RouteRule


class Counted:
    """What the interpreter did, by kernel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.costs: dict[str, Counter[str]] = {}
        execute, dot = GridExecutor.__call__, InterpreterBuilder.create_dot
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

        monkeypatch.setattr(GridExecutor, "__call__", launch)
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
    monkeypatch.setattr(kernels, "FORWARD_UNIT_ROWS", unit_rows)
    monkeypatch.setattr(kernels, "BACKWARD_UNIT_ROWS", unit_rows)
    groups = 2
    q, dout = (torch.randn(1, groups * heads, tokens, head_size).half() for _ in range(2))
    k, v = (torch.randn(1, groups, tokens, head_size).half() for _ in range(2))
    rule = RouteRule(region, block, topk, causal, descriptors_per_region=2)
    grid = RegionGrid(region, block, causal, head_size**-0.5)
    counted = Counted(monkeypatch)
    queries = torch.randn(1, groups, tokens // block, head_size)
    route = fused_route(queries, torch.randn(1, groups, tokens // region * 2, head_size), rule, precision="ieee")
    out, lse = kernels.sparse_attention(q, k, v, route, grid)
    delta = kernels.output_delta(out, dout)
    kernels.sparse_attention_backward(q, k, v, route, grid, dout=dout, lse=lse, delta=delta)
    call = kernels.Call.of(*(x.to("meta") for x in (q, k, v)), route, grid)
    router = router_cost(route, rule, head_size=head_size, element_size=4, num_regions=tokens // region)
    expected = {"route_blocks": router, **forward_cost(call), **backward_cost(call)}
    found = counted.all()
    assert set(found) == set(expected)
    for kernel, cost in expected.items():
        assert found[kernel] == Cost(**{**vars(cost), "held": 0}), kernel


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
