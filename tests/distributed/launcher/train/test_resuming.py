"""A run that goes on with other settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.corpus import small_run
from helpers.job import points_of, run_job
from helpers.pool import RankFailedError, WorkerPool

from biroute.parallel.checkpoint.files import list_checkpoints
from biroute.parallel.checkpoint.meta import read_meta

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


def test_another_run_is_refused_or_accepted(ranks: Ranks, corpus: Path, tmp_path: Path) -> None:
    """By the ranks as well as by the launcher: accept_changes is recorded with the checkpoint that follows."""
    tree = small_run(corpus, tmp_path / "run", steps=2, parallel={"data": 2})
    pool = ranks(2)
    assert set(pool.run(run_job, tree)) == {"finished"}
    tree["train"]["steps"] = 3
    tree["model"]["attention"]["topk"] = 4
    tree["data"]["seed"] = 5
    expected = (
        r"step-00000002: this would not be the run .*\(model\.attention\.topk: 3 there, 4 here, data\.seed: 0 there, "
        r"5 here\).*'train\.accept_changes=\[model\.attention\.topk,data\.seed\]'"
    )
    with pytest.raises(RankFailedError, match=expected):
        pool.run(run_job, tree)
    tree["train"]["accept_changes"] = ["model.attention.topk"]
    with pytest.raises(RankFailedError, match=r"\(data\.seed: 0 there, 5 here\)"):
        pool.run(run_job, tree)
    assert [step for step, _ in points_of(tmp_path / "run")] == [1, 2], "nothing was trained"
    tree["train"]["accept_changes"] += ["data.seed"]
    assert set(pool.run(run_job, tree)) == {"finished"}
    about = read_meta(list_checkpoints(tmp_path / "run" / "checkpoints")[0]).about
    assert about["accepted"] == ["model.attention.topk", "data.seed"]
    assert (about["settings"]["model.attention.topk"], about["settings"]["data.seed"]) == ("4", "5")
    tree["train"] |= {"accept_changes": [], "steps": 4}
    assert set(pool.run(run_job, tree)) == {"finished"}, "it is the run now"
