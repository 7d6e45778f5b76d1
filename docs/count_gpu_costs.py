"""Count what a routed layer does on a GPU, for routes of a trained model; write docs/benchmarks/gpu_on_paper.json.

    biroute train configs/demo.yaml model.hidden_size=256 model.num_heads=8 model.sequence_length=2048 \
        model.attention.region_size=64 parallel.data=1 train.steps=500 train.global_batch_size=2 train.run_dir=RUN
    python docs/count_gpu_costs.py RUN TEXT

RUN is the folder of a trained run with regions of 64 tokens, such as this one; the page's TEXT is the beginning of
the demo's English. Its model reads one long sequence of the text file; from the queries and keys of each layer a
route of 32 regions is chosen, and the first 8 key/value heads are taken for those of one large layer. Causal routes
of the first tokens are those of a shorter sequence. A second kind of route is drawn at random: what neighbours share
is then least. The kernels are not run: their work follows from the route (`model/attention/block_sparse/cost.py`),
and torch's own operations are counted as they are called.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
COSTS = ROOT / "docs" / "benchmarks" / "gpu_on_paper.json"
sys.path.insert(0, str(ROOT / "tests"))

from helpers.emulated_device import FREE  # noqa: E402

from biroute.launcher.bench.gpu.routes import trained_routes  # noqa: E402
from biroute.model.attention.block_sparse import attention, backward, cost, descriptors, forward, plan_kernels, router  # noqa: E402
from biroute.model.attention.block_sparse.descriptors import mean_descriptors  # noqa: E402
from biroute.model.attention.block_sparse.plan_reference import reference_plan  # noqa: E402
from biroute.model.attention.grid import RegionGrid  # noqa: E402
from biroute.model.attention.routing import LARGEST_DESCRIPTOR  # noqa: E402
from biroute.model.attention.rule import RouteRule  # noqa: E402
from biroute.parallel.region.attention import own_regions, part_grid_of  # noqa: E402
from biroute.parallel.region.costs import ExchangeCosts, RegionLayout  # noqa: E402
from biroute.parallel.region.fetched_table import FetchedTable  # noqa: E402
from biroute.parallel.region.plan import plan_exchange  # noqa: E402

HEADS, GROUPS, HEAD_SIZE, REGION, TOPK = 32, 8, 128, 64, 32
LENGTHS = (8_192, 32_768, 131_072)
BLOCKS = (1, 64)
RANKS = (2, 4, 8)
SORT_PASSES = 4  # a radix sort of 16 bits reads and writes twice


class Meter(TorchDispatchMode):
    """Counts torch's operations that start kernels, the bytes of their arguments and results, and memory."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.moved = self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        name = operation._schema.name.split("::")[-1]
        if name not in FREE:
            self.launches += 1
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            self.moved += sum(x.nbytes for x in tensors) * (SORT_PASSES if name == "sort" else 1)
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.hold(x)
        return result

    def hold(self, x: Tensor) -> None:
        """Count the memory of a tensor for as long as it lives."""
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _NotRun:
    """In the place of a kernel."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@contextmanager
def in_place_of(places: list[tuple[Any, str]], other: Callable[[], Any]) -> Iterator[None]:
    """Inside, names of modules mean something else."""
    kept = [getattr(module, name) for module, name in places]
    try:
        for module, name in places:
            setattr(module, name, other())
        yield
    finally:
        for (module, name), one in zip(places, kept, strict=True):
            setattr(module, name, one)


KERNELS = [
    (forward, "region_forward"), (forward, "query_forward"), (backward, "output_delta"),
    (backward, "region_backward"), (backward, "query_backward"), (backward, "finish_head"),
    (backward, "join_units"), (router, "route_blocks"), (descriptors, "mean_rows"), (plan_kernels, "plan_groups"),
    (plan_kernels, "place_regions"), (plan_kernels, "sort_pairs"),
]  # fmt: skip


def random_route(tokens: int, block: int) -> Tensor:
    """The own region, the one before, and others of the past at random: int32 [1, G, N, K], every head the same."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for first in range(0, tokens // block, 4096):
        own = torch.arange(first, min(first + 4096, tokens // block)) * block // REGION
        regions = torch.arange(tokens // REGION)
        score = torch.rand(len(own), len(regions), generator=generator)
        score += ((own[:, None] - regions) >> 1 == 0) * 2.0  # own and previous
        score.masked_fill_(regions > own[:, None], -1.0)
        value, route = score.topk(min(TOPK, len(regions)))
        parts.append(route.masked_fill(value < 0, len(regions)).sort(-1).values.int())
    route = torch.cat(parts)
    return route.masked_fill(route == tokens // REGION, -1).expand(1, GROUPS, -1, -1)


def count(route: Tensor, block: int) -> dict[str, Any]:
    """Everything that a layer with this route does."""
    tokens = route.shape[2] * block
    q, k = of_heads(HEADS, tokens), of_heads(GROUPS, tokens)
    routers = {str(n): count_router(q, k, route, block, n) for n in (1, 8)}
    return {"tokens": tokens, "block": block, **count_attention(q, k, route, grid_of(block)), "router": routers}


def of_heads(heads: int, tokens: int) -> Tensor:
    """Sizes without memory."""
    return torch.empty(1, heads, tokens, HEAD_SIZE, dtype=torch.bfloat16, device="meta")


def grid_of(block: int) -> RegionGrid:
    return RegionGrid(REGION, block, True, HEAD_SIZE**-0.5, path="block_sparse")


def count_attention(q: Tensor, k: Tensor, route: Tensor, grid: RegionGrid) -> dict[str, Any]:
    """Everything that attention does, forward and backward, with the plans of the route."""
    block = grid.query_block_size
    call = attention.Call.of(q, k, k, route, grid)
    # The kernels of the plan would take long in the interpreter.
    with in_place_of([(attention, "make_plan")], lambda: reference_plan):
        kernels = {"forward": cost.forward_cost(call), "backward": cost.backward_cost(call)}
        turned = call.turned()
        launches = list(turned.backward_launches())
    plan = launches[0].plan
    of_tiles = sum((cost.tiles_of_regions(turned, launch) for launch in launches), cost.Cost())
    needed = cost.needed_flops(call)
    tiles = plan.counts.numel()
    shared, scattered, pairs = (int(x.sum()) for x in (plan.counts, plan.scattered, route >= 0))
    del call, plan, turned
    return {
        "tiles": tiles,
        "shared_regions_of_a_tile": shared / tiles,
        "scattered_pairs": scattered / pairs,
        "partial_dq_bytes": scattered * block * HEADS // GROUPS * HEAD_SIZE * q.element_size(),
        # Of region_backward: what it does for tiles, and the queries and upstream gradients of a head in one launch.
        "tiles_of_regions": {
            "flops": of_tiles.flops,
            "read": of_tiles.read,
            "rows_at_once": 2 * launches[0].blocks * block * (HEADS // GROUPS) * HEAD_SIZE * q.element_size(),
        },
        "needed_flops": {"forward": needed[0], "backward": needed[1]},
        "kernels": {side: {name: vars(one) for name, one in costs.items()} for side, costs in kernels.items()},
        "torch": torch_operations(q, k, route, grid),
    }


def count_ranks(route: Tensor, block: int, ranks: int) -> dict[str, Any]:
    """What region ranks compute of their own regions and of those that they fetch, all ranks together."""
    layout = RegionLayout(route.shape[2] * block // REGION, REGION, ranks)
    grid, rows = grid_of(block), HEADS // GROUPS
    costs = ExchangeCosts.of(
        region_size=REGION, query_block_size=block, heads_per_group=rows, head_size=HEAD_SIZE, element_size=2
    )
    q, k = of_heads(HEADS, layout.tokens_per_rank), of_heads(GROUPS, layout.tokens_per_rank)
    own, fetched, shipped = list[dict[str, Any]](), list[dict[str, Any]](), 0
    for rank, of_rank in enumerate(route.long().chunk(ranks, 2)):
        own.append(count_attention(q, k, own_regions(of_rank, layout, rank).int(), grid))
        requests = plan_exchange(of_rank, layout, rank, costs).transfers
        shipped += sum(requests.shipped_pairs())
        table = FetchedTable.of(of_rank, layout, requests)
        if table is not None:
            part_grid = part_grid_of(grid, q, rows * block, 0.0)
            fetched.append(count_attention(q, of_heads(GROUPS, table.size * REGION), table.route, part_grid))
    return {"tokens": route.shape[2] * block, "block": block, "ranks": ranks, "shipped": shipped,
            "own": added(own), "fetched": added(fetched)}  # fmt: skip


def added(rows: list[Any]) -> Any:
    """The sums of numbers in equal places; of what calls have at once, the most."""
    if not isinstance(rows[0], dict):
        return sum(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    return {
        name: (max if name == "rows_at_once" else added)([row[name] for row in rows if name in row]) for name in names
    }


def torch_operations(q: Tensor, k: Tensor, route: Tensor, grid: RegionGrid) -> dict[str, Any]:
    """Torch's own operations around the kernels, and the peak memory of both passes with inputs and gradients."""
    found: dict[str, Any] = {}
    meter = Meter()
    v, dout = torch.empty_like(k), torch.empty_like(q)
    with in_place_of(KERNELS, _NotRun), meter:
        kept = route.clone()  # int32, what autograd keeps
        for x in (q, k, v):
            meter.hold(x)
        meter.launches = meter.moved = 0
        out, lse = attention.sparse_attention(q, k, v, kept, grid)
        found["forward"] = {"launches": meter.launches, "moved": meter.moved}
        meter.launches = meter.moved = 0
        meter.hold(dout)
        delta = attention.output_delta(out, dout)
        gradients = attention.sparse_attention_backward(q, k, v, kept, grid, dout=dout, lse=lse, delta=delta)
        found["backward"] = {"launches": meter.launches, "moved": meter.moved}
    found["peak_bytes"] = meter.peak
    # Dense attention holds its inputs, output, log-sum-exps and all gradients at once, too.
    found["dense_bytes"] = sum(x.nbytes for x in (q, k, v, out, lse, dout, *gradients))
    return found


def count_router(q: Tensor, k: Tensor, route: Tensor, block: int, per_region: int) -> dict[str, Any]:
    """The router with the descriptors that it compares, in bf16."""
    rule = RouteRule(REGION, block, TOPK, True, descriptors_per_region=per_region)
    meter = Meter()
    with in_place_of(KERNELS, _NotRun), meter:
        size = REGION // per_region
        keys = mean_descriptors(k, GROUPS, size, size, largest=LARGEST_DESCRIPTOR)
        queries = mean_descriptors(q, GROUPS, 1, block, largest=LARGEST_DESCRIPTOR, dtype=torch.bfloat16)
        router.fused_route(queries, keys, rule, dtype=torch.bfloat16)
    kernel = cost.router_cost(route, rule, head_size=HEAD_SIZE, element_size=2, num_regions=q.shape[2] // REGION)
    means = cost.descriptors_cost(k, GROUPS, size, size, 4) + cost.descriptors_cost(q, GROUPS, 1, block, 2)
    return {"launches": meter.launches, "moved": meter.moved, "route_blocks": vars(kernel), "mean_rows": vars(means)}


def main() -> None:
    run, text = (Path(name) for name in sys.argv[1:3])
    of_model = trained_routes(run, text, LENGTHS[-1], BLOCKS, region_size=REGION, topk=TOPK, heads=GROUPS)
    rows = []
    for tokens in LENGTHS:
        for block in BLOCKS:
            trained = of_model[block][:, :, : tokens // block].contiguous()
            for kind, route in (("trained", trained), ("random", random_route(tokens, block))):
                rows.append({"route": kind, **count(route, block)})
                sys.stderr.write(f"{kind}, {tokens} tokens, blocks of {block}: counted\n")
    of_ranks = []
    for tokens in LENGTHS[1:]:
        for block in BLOCKS:
            for ranks in RANKS:
                of_ranks.append(count_ranks(of_model[block][:, :, : tokens // block], block, ranks))
                sys.stderr.write(f"{ranks} region ranks, {tokens} tokens, blocks of {block}: counted\n")
    COSTS.write_text(json.dumps({"layers": rows, "ranks": of_ranks}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
