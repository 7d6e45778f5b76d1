"""The table of the exchange benchmark from routes: against the plans' own sums, and what page and picture show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from biroute.configs.load import config_from_tree
from biroute.configs.schema import RunConfig
from biroute.launcher.bench.exchange.page import exchange_page, size
from biroute.launcher.bench.exchange.plan import planned_rows, single_process_plan, spread
from biroute.model.attention.routing import route_regions
from biroute.model.attention.rule import RouteRule
from biroute.parallel.region.costs import ExchangeCosts, RegionLayout
from biroute.parallel.region.plan import plan_exchange, traffic

SEQUENCES, LAYERS = 2, (0, 3)


def configuration(query_block_size: int = 1) -> RunConfig:
    attention = {"region_size": 4, "query_block_size": query_block_size, "topk": 5}
    model = {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "sequence_length": 256, "attention": attention}
    return config_from_tree({"model": model}, "test")


def routes(config: RunConfig, skew: float = 0.0) -> dict[int, torch.Tensor]:
    """Routes of random content, two sequences for each layer; with `skew` all want the first regions."""
    found = {}
    for layer in LAYERS:
        generator = torch.Generator().manual_seed(layer)
        q, k = (torch.randn(SEQUENCES, heads, 256, 8, generator=generator) for heads in (4, 2))
        q, k[:, :, :32] = q + skew, k[:, :, :32] + skew
        attention = config.model.attention
        found[layer] = route_regions(
            q,
            k,
            RouteRule(region_size=4, query_block_size=attention.query_block_size, topk=attention.topk, causal=True),
        )
    return found


def test_traffic_has_every_byte_once() -> None:
    config = configuration()
    layout = RegionLayout(64, 4, 8)
    costs = ExchangeCosts.of(region_size=4, query_block_size=1, heads_per_group=2, head_size=8, element_size=4)
    plans = [plan_exchange(part, layout, rank, costs) for rank, part in enumerate(routes(config)[0].chunk(8, 2))]
    sent = traffic(plans)
    assert sent.diagonal().sum() == 0
    for requester in plans:
        for owner in range(8):
            there, back = int(sent[requester.rank, owner]), int(sent[owner, requester.rank])
            if owner < requester.rank:  # causal: nobody asks a later rank
                assert there == int(requester.sent_bytes()[owner])
                assert back == int(requester.received_bytes()[owner])
            else:
                assert int(requester.sent_bytes()[owner]) == int(requester.received_bytes()[owner]) == 0


def test_spread_names_the_worst_and_the_hottest() -> None:
    sent = torch.tensor([[0, 5, 9], [1, 0, 1], [0, 2, 0]])
    assert spread(sent) == {"mean": 6.0, "worst": 10.0, "worst_rank": 2, "hottest": 14.0, "hottest_sender": 0}


@pytest.mark.parametrize("query_block_size", [1, 4])
def test_rows_hold_the_bounds(query_block_size: int) -> None:
    config = configuration(query_block_size)
    found = routes(config)
    rows = planned_rows(config, found, routes(config, skew=2.0), (2, 3, 8, 64))
    assert [row["ranks"] for row in rows] == [2, 8, 64], "three ranks do not divide 64 regions"
    assert planned_rows(config, found, found, (8,))[0]["random_auto"] == rows[1]["auto"]["mean"]
    assert 0 < rows[1]["random_auto"] < rows[1]["auto"]["mean"], "all want the same few regions"
    for row in rows:
        auto = row["auto"]["mean"]
        assert 0 < auto <= min(row["fetch"]["mean"], row["ship"]["mean"])
        assert auto <= row["bound"]["mean"] <= row["causal_fetch"]["mean"] < row["ring"]["mean"]
        assert row["causal_fetch"]["mean"] == row["ring"]["mean"] / 2
        everything = auto * row["ranks"] * SEQUENCES * len(LAYERS)
        assert everything == pytest.approx(single_process_plan(config, found, row["ranks"]))


def test_bf16_halves_what_is_fetched() -> None:
    config = configuration()
    half = config.model_copy(update={"train": config.train.model_copy(update={"precision": "bf16"})})
    (whole_row,), (half_row,) = (planned_rows(each, routes(config), routes(config), (8,)) for each in (config, half))
    assert half_row["fetch"]["mean"] * 2 == whole_row["fetch"]["mean"]
    assert half_row["ship"]["mean"] * 2 > whole_row["ship"]["mean"], "log-sum-exps stay in fp32"


def test_page_and_picture(tmp_path: Path) -> None:
    config = configuration()
    model = config.model.model_dump(mode="json")
    table: dict[str, Any] = {
        "run": "tiny", "length": 256, "trained_length": 64, "trained_steps": 7, "tokens_per_step": 1024,
        "nats_per_token": (4.5, 4.75), "num_regions": 64, "attention": model["attention"],
        "rows": planned_rows(config, routes(config), routes(config), (2, 64)),
    }  # fmt: skip
    measured = {
        "run": "tiny", "length": 256, "ranks": 2, "measured_payload": 4096, "planned_payload": 4096,
        "single_process_plan": 4064, "received_by_kind": {"keys": 4096, "gradients": 4096}, "wait_seconds": 0.25,
        "seconds": 1.0,
    }  # fmt: skip
    answer = {
        "environment_info": {"machine": "here", "command": "biroute bench exchange"},
        "settings": {"model": model, "precision": "fp32", "sequences": SEQUENCES},
        "tables": [table],
        "measured": [measured],
    }
    page, picture = exchange_page(answer).write(tmp_path)
    text = page.read_text("utf-8")
    row = table["rows"][1]
    share = row["auto"]["mean"] / row["causal_fetch"]["mean"]
    assert "256 tokens (trained at 64), 64 regions of 4, topk 5, a route for every token" in text
    assert f"At 64 ranks the chosen plan moves {share:.1%} of the causal-only fetch" in text
    assert "- run tiny: 7 steps of 1,024 tokens, sequences of 64; 4.500 nats per token here, 4.750 under" in text
    with_descriptors = share + row["descriptors"]["mean"] / row["causal_fetch"]["mean"]
    assert f"; with the descriptors {with_descriptors:.1%})" in text
    assert f"| {size(row['ship']['mean'])} |" in text
    assert "| tiny | 256 | 2 | 4,096 | 4,096 | 4,064 | 8,192 | 25% |" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
