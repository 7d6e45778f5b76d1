"""`biroute bench exchange` as a user runs it: on the checkpoint of a run, with real ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from .conftest import Answer
from .test_cli_errors import assert_one_line

Command = Callable[..., Answer]


def test_routes_of_a_trained_run(config_file: Path, tmp_path: Path, command: Command) -> None:
    assert_one_line(command("bench", "exchange", config_file), "train.run_dir", "run biroute train")
    trained = command("train", config_file, "train.steps=2", "tracking.enabled=false")
    assert trained.status == 0, trained.err
    answer = command(
        "bench", "exchange", config_file, "--compare", config_file, "--length", "64", "--length", "128",
        "--ranks", "2", "--ranks", "4", "--ranks", "16", "--measured", "2", "--sequences", "1", "--json",
        "--out", tmp_path / "page", "model.attention.query_block_size=4",
    )  # fmt: skip
    assert answer.status == 0, answer.err
    found = json.loads(answer.out)
    assert [(t["length"], [row["ranks"] for row in t["rows"]]) for t in found["tables"]] == [
        (64, [2, 4]),
        (128, [2, 4, 16]),
    ] * 2
    for row in found["measured"]:
        assert row["measured_payload"] == row["planned_payload"] > 0
    assert (tmp_path / "page" / "exchange.md").exists()
    wrong = command("bench", "exchange", config_file, "--length", "63", "--plan-only")
    assert_one_line(wrong, "--length 63", "region_size=8")
