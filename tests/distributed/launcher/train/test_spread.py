"""A rank that is slow in a real run is found, though all steps take equally long."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from helpers.corpus import small_run
from helpers.job import points_of, run_job
from helpers.pool import WorkerPool

Ranks = Callable[[int], WorkerPool]


def slow_rank_job(tree: dict[str, Any]) -> list[str]:
    """Train with a rank 1 that takes a nap in each layer; what rank 0 said."""
    import torch.distributed as dist

    from biroute.launcher.track.progress_line import ProgressLine
    from biroute.model.attention.core import CoreAttention

    said, forward = list[str](), CoreAttention.forward

    def late(self: Any, *tensors: Any) -> Any:
        began = time.perf_counter()
        out = forward(self, *tensors)
        if dist.get_rank() == 1:  # slow in proportion, however busy the machine is
            time.sleep(0.15 + 4 * (time.perf_counter() - began))
        return out

    with (
        patch.object(CoreAttention, "forward", late),
        patch.object(ProgressLine, "message", lambda self, text: said.append(text)),
    ):
        run_job(tree)
    return said


def test_a_slow_rank_is_found(ranks: Ranks, corpus: Path, tmp_path: Path) -> None:
    tree = small_run(corpus, tmp_path / "run", steps=4, parallel={"data": 2})
    tree["train"]["evaluate_every"] = 0
    said, _ = ranks(2).run(slow_rank_job, tree)
    assert [rank for _, rank in points_of(tmp_path / "run", "throughput/slowest_rank")] == [1, 1, 1, 1]
    assert min(ratio for _, ratio in points_of(tmp_path / "run", "throughput/slowest_rank_ratio")) > 1.3
    (line,) = [text for text in said if "slowest" in text]
    assert "rank 1 on" in line and "above all forward" in line
