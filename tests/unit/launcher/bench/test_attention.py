"""`biroute bench attention`: what it measures, and memory of routed attention compared with dense attention's."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from biroute.configs.errors import UsageError
from biroute.launcher.bench.attention import measure as bench_attention
from biroute.launcher.bench.attention import page as bench_attention_report
from biroute.launcher.bench.attention.measure import Setting, automatic_region_size, break_even, peak_bytes, slope
from biroute.launcher.bench.commands import bench_app


def test_a_length_is_whole_regions() -> None:
    """Said before anything is measured."""
    for lengths, message in (([512, 700], "700 is no multiple of a region's 64 tokens; use 704"), ([520], "use 512")):
        with pytest.raises(UsageError, match=message):
            bench_attention.check_lengths(lengths)
    bench_attention.check_lengths([*bench_attention.LENGTHS, 704, 131_072])


def test_a_length_leaves_out_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of 16,384 tokens and the training steps of a model as well, which take minutes."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings():
        done = CliRunner().invoke(
            bench_app, ["attention", "--length", "512", "--repeats", "1", "--json"], catch_exceptions=False
        )
    answer = json.loads(done.stdout)
    found = [row["num_tokens"] for part in answer.values() if isinstance(part, list) for row in part]
    assert set(found) == {512} and len(found) > 5


def test_peak_bytes_counts_what_is_held_at_once() -> None:
    def call() -> None:
        first, second = torch.empty(1 << 18), torch.empty(1 << 18)  # 1 MiB each
        del first
        third = torch.empty(1 << 19)
        del second, third

    assert peak_bytes(call) == 3 << 20


@pytest.mark.parametrize(
    ("region_size", "topk", "block", "descriptors", "groups", "path"),
    [
        (64, 8, 64, 1, 2, "query_major"),
        (64, 8, 64, 1, 8, "query_major"),
        (64, 8, 64, 1, 8, "region_major"),
        (64, 8, 1, 1, 2, "region_major"),
        (16, 16, 1, 1, 2, "region_major"),
        (64, 8, 1, 1, 2, "masked"),
        (64, 8, 1, 1, 8, "masked"),
        (64, 8, 1, 64, 2, "region_major"),
        (16, 8, 1, 8, 8, "region_major"),
    ],
)
def test_routed_attention_holds_no_more_than_dense(region_size, topk, block, descriptors, groups, path) -> None:
    setting = Setting("", 1024, region_size, topk, block, groups, descriptors_per_region=descriptors)
    inputs = bench_attention._inputs(setting, "heads_first")
    dense = peak_bytes(lambda: bench_attention._dense(inputs))
    assert peak_bytes(lambda: bench_attention._routed(inputs, setting, path)) <= dense


def rows(times: dict[int, float], ratio: dict[int, float] | None = None) -> list[dict]:
    return [
        {"name": "x", "path": "auto", "num_tokens": n, "seconds": t, "ratio": (ratio or {}).get(n, 1.0)}
        for n, t in times.items()
    ]


def test_slope_and_break_even() -> None:
    assert slope(rows({512: 9.0, 2048: 1.0, 4096: 2.0**1.5, 8192: 2.0**3}), "x") == pytest.approx(1.5)
    assert slope(rows({512: 1.0, 2048: 1.0}), "x") is None
    times = dict.fromkeys((512, 1024, 2048, 4096), 1.0)
    assert break_even(rows(times, {512: 1.2, 1024: 0.9, 2048: 1.0, 4096: 3.0}), "x") == 2048
    assert break_even(rows(times, {512: 2.0, 1024: 2.0, 2048: 2.0, 4096: 0.5}), "x") is None


def test_automatic_region_size_follows_the_cube_root() -> None:
    sizes = [automatic_region_size(n) for n in bench_attention.LENGTHS]
    assert sizes == sorted(sizes)
    assert all(n % size == 0 for n, size in zip(bench_attention.LENGTHS, sizes, strict=True))
    assert automatic_region_size(8 * 2048) == 2 * automatic_region_size(2048)


def test_report_holds_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_attention, "sweep_settings", lambda n: [Setting("swept", n, 16, 4, 16, head_size=16)])
    target = Setting("with a target", 256, 16, 4, 16, head_size=16, target=1.5)

    def train_steps(now: Callable[[], float], repeats: int) -> list[dict]:
        first, second = now(), now()
        assert 0.0 <= second - first < 1.0 and repeats == 1  # a clock of seconds
        row = {"num_layers": 2, "hidden_size": 16, "num_tokens": 256, "region_size": 16, "topk": 4}
        step = {
            **row,
            "query_block_size": 1,
            "seconds": 0.5,
            "tokens_per_second": 512.0,
            "ratio": 1.0,
            "target": None,
        }
        return [{**step, "name": kind, "kind": kind} for kind in ("dense", "bi_level")]

    answer = bench_attention.run_bench(lengths=(128, 256), repeats=1, targets=[target], train_steps=train_steps)
    assert {row["path"] for row in answer["sweep"]} == {"dense", "auto", "query_major", "region_major"}
    dense_rows = [row for row in answer["targets"] + answer["sweep"] if row["path"] == "dense"]
    assert [row["num_tokens"] for row in dense_rows] == [256, 128, 256]
    assert dense_rows[0] is dense_rows[2], "one length and shape is measured once"
    assert all(row["seconds"] > 0 and row["peak_mib"] > 0 for row in answer["targets"] + answer["sweep"])
    page, picture = bench_attention_report.attention_page(answer).write(tmp_path / "benchmarks")
    text = page.read_text(encoding="utf-8")
    assert text.count("\n| ") == len(answer["targets"]) + len(answer["sweep"]) + len(answer["train_steps"]) + 6
    assert "2 layers, hidden 16, S 256" in text
    assert "with a target" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
