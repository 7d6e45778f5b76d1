"""`biroute bench recall`, `quality`'s parts and the pictures: task, model, masked attention, reports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from biroute.configs.errors import UsageError
from biroute.configs.load import config_from_tree
from biroute.launcher.bench.commands import bench_app
from biroute.launcher.bench.quality.page import quality_page
from biroute.launcher.bench.quality.variants import VARIANTS as VARIANTS_OF_QUALITY
from biroute.launcher.bench.quality.variants import variant_config
from biroute.launcher.bench.recall.masked_attention import masked_attention
from biroute.launcher.bench.recall.measure import VARIANTS, RecallSettings, distance_bins, score, train_variant
from biroute.launcher.bench.recall.model import ModelSize, RecallModel, Variant
from biroute.launcher.bench.recall.task import RecallTask
from biroute.launcher.bench.report import Table, select
from biroute.launcher.bench.routing_figures import draw_cost, draw_leak
from biroute.model.attention.bi_level import bi_level_attention
from biroute.model.attention.routing import route_regions
from biroute.model.attention.rule import RouteRule

TASK = RecallTask(128, 16, num_keys=24, num_values=20, num_noise=8)


def test_every_answer_was_seen_after_its_key_and_the_distance_is_right() -> None:
    batch = TASK.batch(8, seed=3)
    assert batch.tokens.shape == (8, 128)
    assert batch.position.shape == batch.answer.shape == batch.distance.shape == (8, 16)
    for tokens, positions, answers, distances in zip(
        batch.tokens.tolist(), batch.position.tolist(), batch.answer.tolist(), batch.distance.tolist(), strict=True
    ):
        asked = set()
        for position, answer, distance in zip(positions, answers, distances, strict=True):
            key = tokens[position]
            assert key < TASK.num_keys <= answer < TASK.num_keys + TASK.num_values
            places = [place for place, token in enumerate(tokens) if token == key]
            assert places == [position - distance, position]  # once before, asked once
            assert tokens[places[0] + 1] == tokens[position + 1] == answer
            assert distance >= 2
            asked.add(key)
        assert len(asked) == TASK.num_pairs
        rest = [token for token in tokens if token >= TASK.num_keys + TASK.num_values]
        assert len(rest) == 128 - 4 * TASK.num_pairs


def test_batches_follow_from_the_seed_and_reach_all_distances() -> None:
    first, again, other = TASK.batch(64, 5), TASK.batch(64, 5), TASK.batch(64, 6)
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.distance, again.distance)
    assert not torch.equal(first.tokens, other.tokens)
    shares = torch.bincount(first.distance.flatten() // 32, minlength=4) / first.distance.numel()
    assert bool((shares > 0.05).all()), shares


def test_sizes_that_do_not_fit_are_the_users_fault() -> None:
    with pytest.raises(UsageError, match="20 pairs in 128 tokens: use 1 to 16"):
        RecallTask(128, 20)
    with pytest.raises(UsageError, match="as many different keys"):
        RecallTask(128, 16, num_keys=8)


def test_bins_hold_every_distance_once() -> None:
    assert distance_bins(256) == [(0, 1), (2, 3), (4, 7), (8, 15), (16, 31)]


@pytest.mark.parametrize("name", ["dense", "local-8x4", "token-2x16", "region-8x4-dense0", "token-8x4-parts4"])
def test_the_model_is_causal_to_the_bit(name: str) -> None:
    torch.manual_seed(0)
    model = RecallModel(TASK.vocab_size, ModelSize(hidden_size=32), VARIANTS[name])
    tokens = torch.randint(TASK.vocab_size, (2, 128))
    changed = tokens.clone()
    changed[:, 77:] = torch.randint(TASK.vocab_size, (2, 51))
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :77], after[:, :77])
    assert not torch.equal(before[:, 77:], after[:, 77:])


def test_a_smeared_key_holds_the_token_before() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(TASK.vocab_size, (1, 16))
    other = tokens.clone()
    other[0, 4] = (other[0, 4] + 1) % TASK.vocab_size
    keys = {}
    for smear in (True, False):
        torch.manual_seed(1)
        model = RecallModel(TASK.vocab_size, ModelSize(num_layers=1), Variant("x", key_smear=smear, topk=3))
        seen: list[torch.Tensor] = []
        (core,) = model.cores()
        everything = torch.arange(4).where(torch.arange(4) <= torch.arange(16)[:, None] // 4, -1)
        core.router = lambda _, k, route=everything, seen=seen: (seen.append(k), route.expand(1, 2, 16, 4))[1]
        with torch.no_grad():
            model(tokens), model(other)
        keys[smear] = [place for place in range(16) if not torch.equal(seen[0][:, :, place], seen[1][:, :, place])]
    assert keys == {True: [4, 5], False: [4]}


@pytest.mark.parametrize(("region_size", "query_block_size", "topk"), [(4, 1, 3), (8, 4, 4), (8, 8, 2)])
def test_the_mask_computes_bi_level_attention(region_size: int, query_block_size: int, topk: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 4, 64, 8, requires_grad=True)
    k, v = (torch.randn(2, 2, 64, 8, requires_grad=True) for _ in range(2))
    sizes = {"region_size": region_size, "query_block_size": query_block_size}
    route = route_regions(q, k, RouteRule(topk=topk, causal=True, **sizes))
    masked = masked_attention(q, k, v, route, **sizes)
    product = bi_level_attention(q, k, v, route, causal=True, **sizes)
    torch.testing.assert_close(masked, product, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(masked)
    for mine, theirs in zip(
        torch.autograd.grad(masked, (q, k, v), upstream),
        torch.autograd.grad(product, (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_training_repeats_and_the_random_route_differs() -> None:
    settings = RecallSettings(steps=3, sequence_length=64, tokens_per_step=128, evaluation_sequences=4)
    one, two = (train_variant(VARIANTS["token-2x8"], 1, settings) for _ in range(2))
    for mine, theirs in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    batch = settings.task.batch(2, 0)
    with torch.no_grad():
        routed = one.logits(batch.tokens, batch.position)
        one.set_router("random")
        assert not torch.equal(routed, one.logits(batch.tokens, batch.position))
    assert score(one, settings, "affinity") == score(two, settings, "affinity")


@pytest.mark.slow
def test_a_dense_model_learns_the_short_task() -> None:
    settings = RecallSettings(steps=250, sequence_length=64, tokens_per_step=1024, evaluation_sequences=32)
    model = train_variant(VARIANTS["dense"], 0, settings)
    assert score(model, settings, "affinity").accuracy > 0.5  # guessing: 0.016


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(bench_app, list(arguments), catch_exceptions=False)


def test_the_command_reports_json_page_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The page names the command of this process: what a shell would have started.
    monkeypatch.setattr("sys.argv", ["/usr/bin/biroute", "bench", "recall", "--steps", "2"])
    arguments = [
        "--steps",
        "2",
        "--evaluation-sequences",
        "8",
        "--variants",
        "local*",
        "--variants",
        "token-8x4",
        "--json",
        "--out",
        str(tmp_path),
    ]
    done = invoke("recall", *arguments)
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert [row["name"] for row in answer["rows"]] == ["local-8x4", "token-8x4"]
    for row in answer["rows"]:
        assert len(row["accuracy"]) == 1 and 0.0 <= row["accuracy"][0] <= 0.2
        assert len(row["by_distance"]) == len(answer["distance_bins"])
        assert row["share_of_tokens"] == 0.125
        assert row["largest_difference_to_bi_level_attention"] < 1e-4
    page = (tmp_path / "recall.md").read_text(encoding="utf-8")
    assert_tables(page, columns=10, rows=2)
    assert "- command: `biroute bench recall --steps 2`" in page and "- machine: " in page
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_finished_rows_are_kept(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    arguments = ["recall", "--steps", "1", "--evaluation-sequences", "2", "--rows", str(rows), "--json"]
    (first,) = json.loads(invoke(*arguments, "--variants", "local*").stdout)["rows"]
    _, again = json.loads(invoke(*arguments, "--variants", "local*", "--variants", "dense").stdout)["rows"]
    assert again == first  # its seconds too: not measured again
    assert len(rows.read_text(encoding="utf-8").splitlines()) == 2
    other = json.loads(invoke(*arguments, "--variants", "local*", "--seeds", "2").stdout)["rows"]
    assert len(other[0]["accuracy"]) == 2  # other settings are measured
    rows.write_text("x", encoding="utf-8")
    with pytest.raises(UsageError, match="not a file of rows"):
        invoke(*arguments)


def assert_tables(page: str, columns: int, rows: int) -> None:
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len(lines) == rows + 2
    assert {line.count("|") - 1 for line in lines} == {columns}


def test_bad_options_are_the_users_fault() -> None:
    with pytest.raises(UsageError, match=r"--variants nothing: no such variant; there are dense, local-8x4"):
        invoke("recall", "--variants", "nothing")
    with pytest.raises(UsageError, match=r"--seeds 0"):
        invoke("recall", "--seeds", "0")
    with pytest.raises(UsageError, match=r"--steps 0"):
        invoke("recall", "--steps", "0")


def test_select_keeps_the_order_and_knows_patterns() -> None:
    assert select(["a1", "b1", "a2"], ["a2", "a1"], ["b1"]) == ["a1", "a2"]
    assert select(["a1", "b1", "a2"], ["*1"], []) == ["a1", "b1"]
    assert select(["a1", "b1"], [], ["b1"]) == ["b1"]
    assert Table("t", ["x", "y"], [["1", "2"]]).markdown() == "## t\n\n| x | y |\n| --- | --: |\n| 1 | 2 |"


# Quality


def test_variants_see_equally_many_tokens() -> None:
    config = config_from_tree({"model": {"attention": {"region_size": 8, "topk": 4}}}, "test")
    sizes = {}
    for name in VARIANTS_OF_QUALITY:
        model = variant_config(config, name, 1, 50).model
        sizes[name] = (model.attention.region_size, model.attention.topk, model.attention.query_block_size)
        assert sizes[name][0] * sizes[name][1] == 32
        assert model.attention_kind(1) == (
            {"dense": "dense", "local": "sliding_window"}.get(name) or model.attention.kind
        )
        assert model.attention_kind(0) == ("dense" if "dense" in name else model.attention.kind)
    assert len({sizes[name] for name in ("token", "token-fine", "block", "region")}) == 4
    one = variant_config(config, "region-dense0", 1, 50)
    assert one.train.seed == one.data.seed == 1 and one.optim.warmup_steps == 10
    small = config_from_tree({"model": {"attention": {"region_size": 4}}}, "test")
    with pytest.raises(UsageError, match="region_size=4: this benchmark needs a multiple of 8"):
        variant_config(small, "dense", 0, 50)


@pytest.mark.slow
def test_kept_rows_of_quality_depend_on_what_decides_the_numbers_alone() -> None:
    from biroute.launcher.bench.quality.measure import rows_depend_on

    def about(**sections: dict[str, Any]) -> dict[str, Any]:
        return rows_depend_on(config_from_tree(sections, "test"))

    assert about(parallel={"data": 2}, checkpoint={"keep": 7}, tracking={"enabled": False}) == about()
    for section, change in {
        "model": {"num_layers": 3},
        "data": {"heldout_fraction": 0.2},
        "optim": {"learning_rate": 0.1},
        "train": {"microbatch_size": 1},
    }.items():
        assert about(**{section: change}) != about(), section


def test_the_quality_page(tmp_path: Path) -> None:
    model = config_from_tree({}, "test").model.model_dump(mode="json")
    rows = [
        {"name": "dense", "kind": "dense", "bits_per_byte": [2.0, 2.2], "random_route": None},
        {"name": "token", "kind": "bi_level", "bits_per_byte": [2.1, 2.1], "random_route": [2.5, 2.6]},
    ]
    sizes = {"region_size": 4, "query_block_size": 1, "topk": 8, "nats_per_token": [5.0, 5.1]}
    settings = {"steps": 1, "tokens_per_step": 64, "model": model, "vocab_size": 300, "learning_rate": 1e-3,
                "heldout_sequences": 4, "tokens_seen": 32}  # fmt: skip
    answer = {"environment_info": {"date": "today"}, "settings": settings, "seeds": [0, 1],
              "rows": [{**row, **sizes} for row in rows]}  # fmt: skip
    page, picture = quality_page(answer).write(tmp_path)
    text = page.read_text(encoding="utf-8")
    assert_tables(text, columns=9, rows=2)
    assert "| token | 4 | 1 | 8 | 2.1000 | 2.1000 2.1000 | +0.0000 | 2.5500 | 5.050 |" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_random_router_reaches_the_layers() -> None:
    from torch import nn

    from biroute.launcher.bench.single_process import set_router
    from biroute.model.attention.core import CoreAttention

    tree = {"sequence_length": 64, "num_heads": 4, "num_kv_heads": 2, "hidden_size": 32}
    model = config_from_tree({"model": {**tree, "attention": {"region_size": 4, "topk": 5}}}, "test").model
    core = CoreAttention(model, 0, num_kv_heads=2)
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, heads, 64, 8) for heads in (4, 2, 2))
    routed = core(query, key, value)
    set_router(nn.Sequential(core), "random")
    assert not torch.allclose(core(query, key, value), routed)
    set_router(nn.Sequential(core), "affinity")
    assert torch.equal(core(query, key, value), routed)


# Pictures


def test_the_leak_is_in_the_mean_query_alone(tmp_path: Path) -> None:
    mean_query, first_token = draw_leak(tmp_path / "leak.png", num_tokens=48).values()
    assert mean_query["reach the past"] > 0 and mean_query["largest"] > 0.1
    assert first_token["reach the past"] == 0 and first_token["largest"] == 0.0
    assert (tmp_path / "leak.png").exists()


def test_small_regions_cost_more_routing(tmp_path: Path) -> None:
    token, parts, region = draw_cost(tmp_path / "cost.png").values()
    assert parts[4] == token[4] and parts[64] > token[64]
    assert token[4] > token[64] > 0
    assert token[4] > region[4]
    assert token[4] < 0.1  # of dense, at 1/32 of the tokens


def test_importing_the_commands_imports_no_torch() -> None:
    program = "import sys, biroute.launcher.bench.commands; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("command", ["attention", "recall", "quality", "pictures"])
def test_help_has_an_example(command: str) -> None:
    assert f"Example: biroute bench {command}" in " ".join(invoke(command, "--help").stdout.split())
