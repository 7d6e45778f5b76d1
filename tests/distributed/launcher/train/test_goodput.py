"""Goodput and model FLOPs utilization as metrics of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.corpus import small_run
from helpers.job import points_of, run_job
from helpers.pool import WorkerPool

from biroute.configs.load import config_from_tree
from biroute.launcher.attempts.journal import read_attempts
from biroute.launcher.plan.hardware import load_hardware
from biroute.model.flops import train_flops_per_step

Ranks = Callable[[int], WorkerPool]


def test_mfu_and_goodput_over_two_attempts(ranks: Ranks, corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    tree = small_run(corpus, run_dir, steps=2, parallel={"data": 2})
    tree["train"]["hardware"] = "h100"
    pool = ranks(2)
    assert set(pool.run(run_job, tree)) == {"finished"}
    # The first attempt has taken an hour, of which its steps were next to nothing.
    lines = [json.loads(line) for line in (run_dir / "attempts.jsonl").read_text().splitlines()]
    lines[0]["time"] -= 3600
    lines[1:] = [{"attempt": 1, "event": "end", "time": lines[0]["time"] + 3600, "status": 75, "cause": "test"}]
    (run_dir / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tree["train"]["steps"] = 4
    assert set(pool.run(run_job, tree)) == {"finished"}

    seconds = dict(points_of(run_dir, "time/step_seconds"))
    config = config_from_tree(tree, "test")
    peak = 2 * load_hardware("h100").flops_per_second("fp32")
    for step, mfu in points_of(run_dir, "throughput/mfu"):
        assert mfu == pytest.approx(train_flops_per_step(config) / seconds[step] / peak)
    goodput = dict(points_of(run_dir, "progress/goodput"))
    assert sorted(goodput) == [1, 2, 3, 4]
    assert len(read_attempts(run_dir)) == 2
    for step in (3, 4):  # of both attempts' time, both attempts' steps
        useful = sum(seconds[n] for n in range(1, step + 1))
        assert useful / 3900 < goodput[step] <= useful / 3600
