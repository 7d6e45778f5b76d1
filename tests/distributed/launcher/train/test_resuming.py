"""A run that goes on with other settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from helpers.corpus import small_run
from helpers.job import points_of, run_job
from helpers.pool import WorkerPool

Ranks = Callable[[int], WorkerPool]


def test_tokens_are_counted_over_changes_of_the_batch(ranks: Ranks, corpus: Path, tmp_path: Path) -> None:
    tree = small_run(corpus, tmp_path / "run", steps=2, parallel={"data": 2})
    pool = ranks(2)
    assert set(pool.run(run_job, tree)) == {"finished"}
    tree["train"] |= {"steps": 4, "global_batch_size": tree["train"]["global_batch_size"] // 2}
    assert set(pool.run(run_job, tree)) == {"finished"}
    tokens = [value for _, value in points_of(tmp_path / "run", "progress/tokens")]
    step = tree["train"]["global_batch_size"] * 64
    assert tokens == [2 * step, 4 * step, 5 * step, 6 * step]
