"""Saves that fail for a while: tried again, then left out once, and never in silence."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from helpers.corpus import small_run
from helpers.job import run_job
from helpers.pool import WorkerPool

from biroute.configs.errors import UsageError
from biroute.configs.load import config_from_tree
from biroute.data_pipeline.prepare.build import build_dataset
from biroute.data_pipeline.prepare.progress_bar import Progress

Ranks = Callable[[int], WorkerPool]


def failing_job(tree: dict[str, Any], failures: int, code: int = errno.EIO) -> tuple[str, list[str]]:
    """Train while the first `failures` files of rank 1 cannot be written; how it ended, and what rank 0 said."""
    import torch.distributed as dist

    from biroute.launcher.track.progress_line import ProgressLine
    from biroute.parallel.checkpoint import save

    write_file, left, said = save.write_file, [failures if dist.get_rank() == 1 else 0], []

    def fail_at_first(path: Path, content: Any, piece_written: Callable[[], None]) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        return write_file(path, content, piece_written)

    with (
        patch.object(save, "write_file", fail_at_first),
        patch("biroute.launcher.train.trainer.SAVE_PAUSES", (0.1, 0.2)),
        patch.object(ProgressLine, "message", lambda self, text: said.append(text)),
    ):
        try:
            return run_job(tree), said
        except UsageError as error:
            return str(error), said


def warnings_of_saves(said: list[str]) -> list[str]:
    """Without that of a slow rank, which a busy machine makes of either."""
    return [text for text in said if text.startswith("warning: ") and "checkpoint" in text]


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
    told = warnings_of_saves(said)
    assert len(told) == warnings and "trying again in 0.1 s" in told[0]
    assert ("training goes on without a checkpoint of step 1" in told[-1]) == (failures == 3)


def test_a_folder_that_cannot_be_written_is_no_full_disk(ranks: Ranks, corpus: Path, tmp_path: Path) -> None:
    """It is not tried again, as it won't pass, and the remedy is not to free space."""
    tree = small_run(corpus, tmp_path / "run", steps=5, parallel={"data": 2})
    (end, said), (other, _) = ranks(2).run(failing_job, tree, 1, errno.EACCES)
    assert end == other
    assert "could not save the checkpoint ([Errno 13] Permission denied)" in end
    assert "make train.run_dir writable for every rank" in end and "space" not in end
    assert not warnings_of_saves(said)


def test_a_source_that_training_leaves_out_is_named_at_the_start(ranks: Ranks, corpus: Path, tmp_path: Path) -> None:
    tree = small_run(corpus, tmp_path / "run", steps=1, parallel={})
    with open(corpus / "docs.jsonl", encoding="utf-8") as file:
        (tmp_path / "docs.jsonl").write_text("".join(islice(file, 60)), "utf-8")
    (tmp_path / "tiny.txt").write_text("A few words, no more.")
    tree["data"] |= {
        "dir": str(tmp_path / "dataset"),
        "sources": [{"name": name, "paths": [str(tmp_path / file)]} for name, file in
                    (("docs", "docs.jsonl"), ("tiny", "tiny.txt"))],
        "tokenizer": {"vocab_size": 400, "model_path": str(corpus / "dataset" / "tokenizer.model")},
        "min_document_bytes": 1,
    }  # fmt: skip
    build_dataset(config_from_tree(tree, "test").data, Progress(quiet=True))
    ((end, said),) = ranks(1).run(failing_job, tree, 0)
    assert end == "finished"
    assert [text for text in said if "source tiny is left out of training" in text]
