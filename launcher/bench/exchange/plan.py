"""Compute from routes of whole sequences the bytes that region ranks would move, by each way and by other methods.

Legend: B sequences, G key/value heads, N query blocks, K slots of a route, P region ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from torch import Tensor

from biroute.configs.schema import RunConfig
from biroute.launcher.bench.report import mean
from biroute.parallel.region.costs import Baselines, ExchangeCosts, RegionLayout
from biroute.parallel.region.plan import ExchangePlan, Way, plan_exchange, traffic

WAYS: tuple[Way, ...] = get_args(Way)


Routes = dict[int, Tensor]  # layer -> int64 [B, G, N, K] of whole sequences


def planned_rows(
    config: RunConfig, routes: Routes, random_routes: Routes, ranks: Sequence[int]
) -> list[dict[str, Any]]:
    """Plan the exchange for each number of ranks that divides the regions.

    Args:
        config: the configuration of the model.
        routes: its routes.
        random_routes: routes of the same sequences under a random router.
        ranks: numbers of ranks.

    Returns:
        A row for each number of ranks: the bytes of a rank in the forward pass of one layer and sequence, by each
        way, by other methods, and by the chosen plan for the random routes.
    """
    rows = []
    for size in ranks:
        if config.model.num_regions % size == 0:
            random = traffic(_plans(config, random_routes, size, "auto"))
            share = 1 / (size * _passes(random_routes))
            rows.append({**_planned_row(config, routes, size), "random_auto": int(random.sum()) * share})
    return rows


def _passes(routes: Routes) -> int:
    """Return the number of layers times sequences."""
    return sum(route.shape[0] for route in routes.values())


def single_process_plan(config: RunConfig, routes: Routes, ranks: int) -> int:
    """Return the planned payload of the forward pass, in bytes, of all layers, sequences and ranks together."""
    return int(traffic(_plans(config, routes, ranks, "auto")).sum())


def _plans(config: RunConfig, routes: Routes, ranks: int, way: Way) -> list[ExchangePlan]:
    """Return the plans of all ranks for all layers."""
    model = config.model
    layout = RegionLayout(model.num_regions, model.attention.region_size, ranks)
    costs = _costs(config)
    return [
        plan_exchange(part, layout, rank, costs, way)
        for route in routes.values()
        for rank, part in enumerate(route.chunk(ranks, 2))
    ]


def _costs(config: RunConfig) -> ExchangeCosts:
    """Return the bytes of a region, of a query block and of its results in the precision of the run."""
    model = config.model
    return ExchangeCosts.of(
        region_size=model.attention.region_size,
        query_block_size=model.attention.query_block_size,
        heads_per_group=model.num_heads // model.num_kv_heads,
        head_size=model.head_size,
        element_size=2 if config.train.precision == "bf16" else 4,
    )


def _planned_row(config: RunConfig, routes: Routes, ranks: int) -> dict[str, Any]:
    row: dict[str, Any] = {"ranks": ranks, "regions_per_rank": config.model.num_regions // ranks}
    for way in WAYS:
        plans = _plans(config, routes, ranks, way)
        row[way] = spread(traffic(plans) / _passes(routes))
        if way == "auto":
            transfers = sum(len(plan.transfers.sizes) for plan in plans)
            row["shipped_units"] = sum(size.ship for plan in plans for size in plan.transfers.sizes) / max(
                1, transfers
            )
    others = descriptor_bytes(config) * (ranks - 1) / ranks
    row["descriptors"] = {"mean": others, "worst": others}
    baselines = _baselines(config, ranks)
    for name in ("causal_fetch", "ring", "bound"):
        values = [float(getattr(one, name)) for one in baselines]
        row[name] = {"mean": mean(values), "worst": max(values)}
    return row


def descriptor_bytes(config: RunConfig) -> int:
    """Return the bytes of all key descriptors (fp32) of one layer and sequence, which every rank gathers."""
    model = config.model
    return model.num_regions * model.attention.descriptors_per_region * model.num_kv_heads * model.head_size * 4


def _baselines(config: RunConfig, ranks: int) -> list[Baselines]:
    """Return the baselines of each rank for one layer and sequence."""
    model = config.model
    layout = RegionLayout(model.num_regions, model.attention.region_size, ranks)
    return [
        Baselines.of(
            layout,
            rank,
            _costs(config),
            groups=model.num_kv_heads,
            blocks=layout.tokens_per_rank // model.attention.query_block_size,
            topk=model.attention.topk,
            causal=model.causal,
        )
        for rank in range(ranks)
    ]


def spread(sent: Tensor) -> dict[str, float]:
    """Summarize the bytes from rank to rank [P, P]: the mean per rank, and which ranks receive and send most."""
    received_P, sent_P = sent.sum(0), sent.sum(1)
    return {
        "mean": float(received_P.double().mean()),
        "worst": float(received_P.max()),
        "worst_rank": int(received_P.argmax()),
        "hottest": float(sent_P.max()),
        "hottest_sender": int(sent_P.argmax()),
    }
