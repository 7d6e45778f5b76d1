"""Saves that fail for a while: tried again, then left out once, and never in silence."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from helpers.corpus import small_run
from helpers.job import run_job
from helpers.pool import WorkerPool

from biroute.configs.errors import UsageError

Ranks = Callable[[int], WorkerPool]


def failing_job(tree: dict[str, Any], failures: int) -> tuple[str, list[str]]:
    """Train while the first `failures` files of rank 1 cannot be written; how it ended, and what rank 0 said."""
    import torch.distributed as dist

    from biroute.launcher.track.progress_line import ProgressLine
    from biroute.parallel.checkpoint import save

    write_file, left, said = save.write_file, [failures if dist.get_rank() == 1 else 0], []

    def fail_at_first(path: Path, content: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return write_file(path, content)

    with (
        patch.object(save, "write_file", fail_at_first),
        patch("biroute.launcher.train.trainer.SAVE_PAUSES", (0.1, 0.2)),
        patch.object(ProgressLine, "message", lambda self, text: said.append(text)),
    ):
        try:
            return run_job(tree), said
        except UsageError as error:
            return str(error), said


@pytest.mark.parametrize(
    ("failures", "ends", "left", "warnings"),
    [
        (2, "finished", [2, 4, 5], 2),  # the third try of step 1 succeeds
        (3, "finished", [2, 4, 5], 3),  # step 1 is left out
        (6, "could not save the checkpoint ([Errno 5] Input/output error)", [], 5),  # and step 2 as well
    ],
)
def test_a_save_is_tried_again(
    ranks: Ranks, corpus: Path, tmp_path: Path, failures: int, ends: str, left: list[int], warnings: int
) -> None:
    tree = small_run(corpus, tmp_path / "run", steps=5, parallel={"data": 2})
    tree["checkpoint"] = {"every_steps": 1, "keep": 1, "keep_every": 2}
    (end, said), (other, _) = ranks(2).run(failing_job, tree, failures)
    assert ends in end and ends in other
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(int(path.name[5:]) for path in folder.iterdir()) == left
    told = [text for text in said if text.startswith("warning: ")]
    assert len(told) == warnings and "trying again in 0.1 s" in told[0]
    assert ("training goes on without a checkpoint of step 1" in told[-1]) == (failures == 3)
