"""kill -9 at a random step, then the same command again: bit for bit the run that was never disturbed."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.corpus import small_run
from helpers.job import points_of, run_job, until
from helpers.pool import RankFailedError, WorkerPool

from biroute.parallel.checkpoint.files import list_checkpoints

Ranks = Callable[[int], WorkerPool]
STEPS = 8
LAYOUTS = {
    "tensor 2": {"tensor": 2, "zero_stage": 0},
    "pipeline 2": {"pipeline": 2, "zero_stage": 1},
    "ZeRO 1": {"data": 2, "zero_stage": 1},
    "ZeRO 2": {"data": 2, "zero_stage": 2},
    "ZeRO 3": {"data": 2, "zero_stage": 3},
}


def kill_after(pool: WorkerPool, run_dir: Path, step: int, delay_seconds: float) -> None:
    """kill -9 all ranks once `step` is logged, and a random moment later."""
    until(lambda: len(points_of(run_dir)) >= step)
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
