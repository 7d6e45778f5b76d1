"""Asked to stop in the middle of anything, ranks stop together with the state saved, and the curve shows no trace."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.corpus import small_run
from helpers.job import points_of, run_job, until
from helpers.pool import RankFailedError, WorkerPool
from helpers.training import small_config, start_engine, train

from biroute.configs.errors import FencedError
from biroute.data_pipeline.read.loader import Batch
from biroute.launcher.attempts.journal import FencingToken, begin_attempt, read_attempts
from biroute.launcher.attempts.run_files import log_dir
from biroute.parallel.checkpoint.files import list_checkpoints
from biroute.parallel.checkpoint.meta import TrainingProgress, read_meta
from biroute.parallel.checkpoint.save import save_checkpoint

Ranks = Callable[[int], WorkerPool]
STEPS = 6
NAMES = ("train/loss", "heldout/loss", "heldout/bits_per_byte")


def tree_of(corpus: Path, run_dir: Path, parallel: dict[str, Any]) -> dict[str, Any]:
    """A run whose evaluations last: many batches, so that a signal can come between two of them."""
    tree = small_run(corpus, run_dir, steps=STEPS, parallel=parallel)
    tree["train"] |= {"evaluate_every": 3, "evaluate_sequences": 48}
    tree["checkpoint"] = {"every_steps": 2}
    return tree


def signalled_job(tree: dict[str, Any], place: str, step: int, rank: int, number: int) -> str:
    """Run, and send `number` to `rank` in the middle of the evaluation after `step`, or of the save.

    What jobs patch here ends with the rank's process.
    """
    import torch.distributed as dist

    from biroute.data_pipeline.read.loader import HeldoutBatches
    from biroute.launcher.train import session, trainer

    left: list[str] = []
    session.leave_processes = lambda backend, close: bool(left.append(backend))  # type: ignore[assignment]
    batches, save = HeldoutBatches.__iter__, trainer.save_checkpoint

    def signal_then_save(
        engine: Any, folder: Path, progress: TrainingProgress, *arguments: Any, **options: Any
    ) -> Path:
        if place == "save" and progress.step == step and dist.get_rank() == rank:
            os.kill(os.getpid(), number)
        return save(engine, folder, progress, *arguments, **options)

    def signal_in_between(self: HeldoutBatches) -> Iterator[Batch]:
        for index, batch in enumerate(batches(self)):
            if place == "evaluation" and index == len(self) // 2 and dist.get_rank() == rank:
                os.kill(os.getpid(), number)
            yield batch

    HeldoutBatches.__iter__ = signal_in_between  # type: ignore[method-assign]
    trainer.save_checkpoint = signal_then_save  # type: ignore[assignment]
    end = run_job(tree)
    assert left == ["gloo"], "with NCCL a rank that leaves first would fail the others"
    return end


@pytest.mark.parametrize("parallel", [{"data": 2}, {"pipeline": 2, "zero_stage": 1}], ids=str)
def test_stopped_in_evaluation_and_in_a_save(
    parallel: dict[str, Any], ranks: Ranks, corpus: Path, tmp_path: Path
) -> None:
    """Signals reach one rank only: all stop, and the resumed run does the evaluation that was cut off."""
    pool = ranks(2)
    undisturbed, run_dir = tmp_path / "undisturbed", tmp_path / "disturbed"
    assert set(pool.run(run_job, tree_of(corpus, undisturbed, parallel))) == {"finished"}
    tree = tree_of(corpus, run_dir, parallel)

    in_evaluation = pool.run(signalled_job, tree, "evaluation", 3, 1, signal.SIGTERM)
    assert all(end.startswith("StoppedError: stopped by SIGTERM after step 3;") for end in in_evaluation)
    newest = list_checkpoints(run_dir / "checkpoints")[0]
    assert read_meta(newest).progress.evaluation_pending, "it was cut off, not waited for"
    assert points_of(run_dir, "heldout/loss") == []

    in_save = pool.run(signalled_job, tree, "save", 4, 0, signal.SIGUSR1)
    assert all("by SIGUSR1 after step 4;" in end for end in in_save), in_save
    assert list_checkpoints(run_dir / "checkpoints")[0].name == "step-00000004"

    assert set(pool.run(run_job, tree)) == {"finished"}
    for name in NAMES:
        assert points_of(run_dir, name) == points_of(undisturbed, name), name
    assert len(points_of(run_dir, "heldout/loss")) == 2
    assert len(read_attempts(run_dir)) == 3
    stopped = json.loads((log_dir(run_dir, 1) / "stopped.json").read_text())
    assert stopped == {"step": 3, "signal": "SIGTERM"}, "although rank 0 did not get it"


def diverging_job(tree: dict[str, Any]) -> str:
    """Run with a gradient that is not finite from the second step on, and a signal right after the third."""
    from biroute.launcher.train.trainer import Trainer

    count = Trainer._count_skipped

    def count_then_signal(self: Trainer, *arguments: Any) -> None:
        count(self, *arguments)
        if self.step == 3:
            assert self._unsound
            os.kill(os.getpid(), signal.SIGUSR1)

    Trainer._count_skipped = count_then_signal  # type: ignore[method-assign]
    return run_job(tree)


def test_what_is_saved_while_a_run_diverges_displaces_no_good_checkpoint(
    ranks: Ranks, corpus: Path, tmp_path: Path
) -> None:
    tree = tree_of(corpus, tmp_path / "run", {})
    tree["checkpoint"] = {"every_steps": 1, "keep": 1}
    tree["optim"] = {"learning_rate": 1e25, "min_learning_rate": 1e25, "warmup_steps": 0}
    (end,) = ranks(1).run(diverging_job, tree)
    assert "by SIGUSR1 after step 3" in end
    names = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["step-00000003", "step-00000001"]


def failing_job(tree: dict[str, Any]) -> str:
    """Run, and fail on one rank in the middle of the first evaluation."""
    import torch.distributed as dist

    from biroute.data_pipeline.read.loader import HeldoutBatches

    batches = HeldoutBatches.__iter__

    def fail_in_between(self: HeldoutBatches) -> Iterator[Batch]:
        for index, batch in enumerate(batches(self)):
            if index == 2 and dist.get_rank() == 1:
                raise MemoryError("no room for an evaluation")
            yield batch

    HeldoutBatches.__iter__ = fail_in_between  # type: ignore[method-assign]
    return run_job(tree)


def test_a_failed_evaluation_costs_no_checkpoint_and_is_repeated(ranks: Ranks, corpus: Path, tmp_path: Path) -> None:
    pool, run_dir = ranks(2), tmp_path / "run"
    tree = tree_of(corpus, run_dir, {"data": 2})
    tree["checkpoint"]["every_steps"] = 3
    with pytest.raises(RankFailedError, match="no room for an evaluation"):
        pool.run(failing_job, tree)
    (checkpoint,) = list_checkpoints(run_dir / "checkpoints")
    progress = read_meta(checkpoint).progress
    assert (progress.step, progress.evaluation_pending) == (3, True)
    assert points_of(run_dir, "heldout/loss") == []

    assert set(pool.run(run_job, tree)) == {"finished"}
    assert [step for step, _ in points_of(run_dir, "heldout/loss")] == [3, STEPS]
    done = list_checkpoints(run_dir / "checkpoints")
    assert [read_meta(path).progress.evaluation_pending for path in done] == [False, False]


def starving_job(tree: dict[str, Any], blocked: Path) -> str:
    """Rank 1's disk answers no more from the fifth step on."""
    import torch.distributed as dist

    from biroute.data_pipeline.read.loader import SequenceReader

    read = SequenceReader.sequences

    def stalled(self: SequenceReader, positions: Any) -> Any:
        if dist.get_rank() == 1 and self.split == "train" and positions.min() >= 4 * 4:
            blocked.touch()
            time.sleep(3600)
        return read(self, positions)

    SequenceReader.sequences = stalled  # type: ignore[method-assign]
    return run_job(tree)


def test_stopped_while_waiting_for_data(ranks: Ranks, corpus: Path, tmp_path: Path) -> None:
    pool = ranks(2)
    blocked = tmp_path / "blocked"
    tree = small_run(corpus, tmp_path / "run", steps=8, parallel={"data": 2})
    tree["train"]["evaluate_every"] = 0

    def both() -> None:
        until(lambda: blocked.exists() and len(points_of(tmp_path / "run")) == 4)
        for rank in range(2):
            os.kill(pool.pid(rank), signal.SIGTERM)

    sender = threading.Thread(target=both)
    sender.start()
    try:
        ends = pool.run(starving_job, tree, blocked)
    finally:
        sender.join()
    assert all("stopped by SIGTERM after step 4;" in end for end in ends), ends
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[0]
    assert read_meta(newest).progress.sequences == 4 * 4, "what was prepared ahead is not counted"


def fenced_save_job(run_dir: Path, attempt: int) -> str:
    engine = start_engine(small_config(parallel={"data": 2}))
    train(engine, (1,))
    owner = FencingToken(run_dir, attempt)
    try:
        about = {"model": {"model.hidden_size": 32}}
        save_checkpoint(engine, run_dir / "checkpoints", TrainingProgress(step=1, sequences=8), about, 1, owner=owner)
    except FencedError as error:
        return str(error)
    return "saved"


def test_a_stale_attempt_publishes_and_removes_nothing(ranks: Ranks, tmp_path: Path) -> None:
    first = begin_attempt(tmp_path, nodes=["n1"], world_size=2)
    assert ranks(2).run(fenced_save_job, tmp_path, first) == ["saved"] * 2
    second = begin_attempt(tmp_path, nodes=["n2"], world_size=2)
    being_written = tmp_path / "checkpoints" / f"step-00000001.attempt-{second:04d}.partial"
    being_written.mkdir()
    before = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    for answer in ranks(2).run(fenced_save_job, tmp_path, first):
        assert answer.startswith("attempt 1 no longer owns")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == before
    assert ranks(2).run(fenced_save_job, tmp_path, second) == ["saved"] * 2
    assert not being_written.exists()


def stale_run_job(tree: dict[str, Any]) -> str:
    """A run that loses its folder to another attempt in mid-training."""
    import torch.distributed as dist

    from biroute.launcher.train.trainer import Trainer

    log = Trainer._log

    def lose(self: Trainer, *arguments: Any) -> None:
        log(self, *arguments)
        if self.step == 3 and dist.get_rank() == 0:
            begin_attempt(self.config.train.run_dir, nodes=["elsewhere"], world_size=2)

    Trainer._log = lose  # type: ignore[method-assign]
    return run_job(tree)


def test_a_run_that_lost_its_folder_ends_without_another_word(ranks: Ranks, corpus: Path, tmp_path: Path) -> None:
    tree = small_run(corpus, tmp_path / "run", steps=400, parallel={"data": 2})
    tree["checkpoint"]["every_steps"] = 0
    tree["train"]["evaluate_every"] = 0
    for end in ranks(2).run(stale_run_job, tree):
        assert end.startswith("FencedError: attempt 1 no longer owns"), end
    assert [step for step, _ in points_of(tmp_path / "run")] == [1, 2, 3]
    assert not (tmp_path / "run" / "checkpoints").exists()
