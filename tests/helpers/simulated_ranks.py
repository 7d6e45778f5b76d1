"""A mesh of many simulated ranks in one process: `python simulated_ranks.py LAYOUT_JSON` prints what was found.

torch's `fake` backend answers every collective at once, so each rank in turn can build its groups as it would on a
cluster. In a process of its own, because torch and Megatron-core keep their groups in module globals.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"


def simulate(sizes: dict[str, int]) -> dict[str, Any]:
    """Groups of some ranks as Megatron-core made them, plans of all region ranks, and the seconds that it took."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from biroute.configs.layout import Layout
    from biroute.parallel.mesh.megatron import prepare_megatron, stop_process_groups
    from biroute.parallel.mesh.mesh import build_mesh

    prepare_megatron(torch.device("cpu"))
    layout = Layout(**sizes, zero_stage=1)
    groups_of = {
        "tensor": parallel_state.get_tensor_model_parallel_group,
        "region": parallel_state.get_context_parallel_group,
        "data": parallel_state.get_data_parallel_group,
        "pipe": parallel_state.get_pipeline_model_parallel_group,
        "data and region": lambda: parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    found: dict[str, Any] = {"ranks": {}, "mesh_seconds": []}
    for rank in (0, 1, layout.world_size // 3, layout.world_size - 1):
        dist.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
        started = time.perf_counter()
        mesh = build_mesh(layout)
        found["mesh_seconds"].append(time.perf_counter() - started)
        found["ranks"][rank] = {
            "at": vars(mesh.at),
            "groups": {name: dist.get_process_group_ranks(group()) for name, group in groups_of.items()},
        }
        stop_process_groups()
        dist.destroy_process_group()
    started = time.perf_counter()
    found["traffic"] = planned_traffic(layout.region)
    found["plan_seconds"] = time.perf_counter() - started
    return found


def planned_traffic(region_ranks: int) -> dict[str, Any]:
    """Plans of all region ranks of one layer, and what the owners learn of them."""
    import torch

    from biroute.model.attention.routing import route_regions
    from biroute.model.attention.rule import RouteRule
    from biroute.parallel.region.costs import ExchangeCosts, RegionLayout
    from biroute.parallel.region.plan import plan_exchange, traffic
    from biroute.parallel.region.transfers import pack_requests, unpack_requests

    layout, topk = RegionLayout(4 * region_ranks, 16, region_ranks), 8
    tokens = layout.num_regions * layout.region_size
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, tokens, 16, generator=generator) for heads in (4, 2))
    route = route_regions(q, k, RouteRule(region_size=16, query_block_size=1, topk=topk, causal=True))
    costs = ExchangeCosts.of(region_size=16, query_block_size=1, heads_per_group=2, head_size=16, element_size=2)
    plans = [plan_exchange(part, layout, rank, costs) for rank, part in enumerate(route.chunk(region_ranks, 2))]
    packed = [pack_requests(plan.transfers) for plan in plans]
    messages = [message.split(lengths) for _, message, lengths in packed]
    headers = torch.stack([header for header, _, _ in packed], 1)  # by owner, then by requester
    served = [
        unpack_requests(header, header.tolist(), torch.cat([parts[owner] for parts in messages]), topk)
        for owner, header in enumerate(headers)
    ]
    return {
        "bytes": int(traffic(plans).sum()),
        "asked": sum(plan.transfers.requested_region.numel() for plan in plans),
        "served": sum(units.requested_region.numel() for units in served),
        "causal_fetch": sum(rank * 2 * layout.regions_per_rank * costs.region for rank in range(region_ranks)),
    }


if __name__ == "__main__":
    print(json.dumps(simulate(json.loads(sys.argv[1]))))
