"""The ranks of a node check the dataset together: each a part of its shards, and all end with what one has found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from helpers.corpus import small_run
from helpers.job import run_job
from helpers.pool import WorkerPool

Ranks = Callable[[int], WorkerPool]


def opening_job(tree: dict[str, Any]) -> tuple[str, list[str]]:
    """Train; how it ended, and the shards that this rank opened to check them."""
    from biroute.configs.errors import UsageError
    from biroute.data_pipeline.prepare import verify

    open_shard, opened = verify.open_shard, list[str]()

    def note(folder: Path, shard: Any) -> Any:
        opened.append(shard.file)
        return open_shard(folder, shard)

    with patch.object(verify, "open_shard", note):
        try:
            return run_job(tree), opened
        except UsageError as error:
            return str(error), opened


@pytest.fixture
def tree(corpus: Path, tmp_path: Path) -> dict[str, Any]:
    found = small_run(corpus, tmp_path / "run", steps=1, parallel={"data": 2})
    shutil.copytree(corpus / "dataset", tmp_path / "dataset")
    found["data"] = found["data"] | {"dir": str(tmp_path / "dataset")}
    return found


def test_each_shard_is_opened_by_one_rank(ranks: Ranks, tree: dict[str, Any], tmp_path: Path) -> None:
    (end, first), (_, second) = ranks(2).run(opening_job, tree)
    assert end == "finished"
    shards = {str(path.relative_to(tmp_path / "dataset")) for path in (tmp_path / "dataset").glob("*/*.tar")}
    assert sorted(first + second) == sorted(shards)
    assert first and second


def test_a_fault_that_one_rank_finds_ends_all(ranks: Ranks, tree: dict[str, Any], tmp_path: Path) -> None:
    (_, first), (_, second) = ranks(2).run(opening_job, tree)
    for faulty in (first[-1], second[-1]):
        shutil.copy(tmp_path / "dataset" / faulty, tmp_path / "whole")
        (tmp_path / "dataset" / faulty).unlink()
        ends = {end for end, _ in ranks(2).run(opening_job, tree)}
        shutil.copy(tmp_path / "whole", tmp_path / "dataset" / faulty)
        assert len(ends) == 1 and faulty in ends.pop()
