"""kill -9 at a random step, then the same command again: bit for bit the run that was never disturbed."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.corpus import small_run
from helpers.pool import RankFailedError, WorkerPool

from biroute.configs.load import config_from_tree
from biroute.parallel.checkpoint_files import list_checkpoints

Ranks = Callable[[int], WorkerPool]
STEPS = 8
LAYOUTS = {
    "tensor 2": {"tensor": 2, "zero_stage": 0},
    "pipeline 2": {"pipeline": 2, "zero_stage": 1},
    "ZeRO 1": {"data": 2, "zero_stage": 1},
    "ZeRO 2": {"data": 2, "zero_stage": 2},
    "ZeRO 3": {"data": 2, "zero_stage": 3},
}


def run_job(tree: dict[str, Any]) -> None:
    """What a rank does in `biroute train`."""
    import torch.distributed as dist

    from biroute.launcher.preemption import StopRequest
    from biroute.launcher.processes import Place
    from biroute.launcher.run import run

    place = Place(dist.get_rank(), dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    run(config_from_tree(tree, "test"), place, StopRequest())


def points_of(run_dir: Path) -> list[tuple[int, float]]:
    """(step, training loss) of each point, in the order they were written."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    points = [json.loads(line) for line in lines]
    return [(p["step"], p["metrics"]["train/loss"]) for p in points if "train/loss" in p["metrics"]]


def kill_after(pool: WorkerPool, run_dir: Path, step: int, delay_seconds: float) -> None:
    """kill -9 all ranks once `step` is logged, and a random moment later."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run_dir / "metrics.jsonl").exists() and len(points_of(run_dir)) >= step:
            break
        time.sleep(0.005)
    time.sleep(delay_seconds)
    pool.kill()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_and_resumed_equals_undisturbed(layout: str, ranks: Ranks, corpus: Path, tmp_path: Path) -> None:
    pool = ranks(2)
    trees = {}
    for name in ("undisturbed", "killed"):
        trees[name] = small_run(corpus, tmp_path / name, steps=STEPS, parallel=LAYOUTS[layout])
    pool.run(run_job, trees["undisturbed"])
    dice = random.Random(layout)
    step, delay = dice.randint(2, STEPS - 2), dice.random() * 0.2
    killer = threading.Thread(target=kill_after, args=(pool, tmp_path / "killed", step, delay))
    killer.start()
    with pytest.raises(RankFailedError, match="died"):
        pool.run(run_job, trees["killed"])
    killer.join()
    pool.run(run_job, trees["killed"])

    assert points_of(tmp_path / "killed") == points_of(tmp_path / "undisturbed"), "each step once, the same losses"
    ours, theirs = (list_checkpoints(tmp_path / name / "checkpoints")[0] for name in ("killed", "undisturbed"))
    assert ours.name == theirs.name == f"step-{STEPS:08d}"
    for file in sorted(theirs.glob("weights-*")):
        expected, found = (torch.load(folder / file.name, weights_only=True) for folder in (theirs, ours))
        assert expected.keys() == found.keys()
        for name, entry in expected.items():
            for kind, value in entry["state"].items():
                assert torch.equal(found[name]["state"][kind], value), f"{name} {kind}"
