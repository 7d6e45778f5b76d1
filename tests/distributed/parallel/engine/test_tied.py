"""A tied embedding on two stages of a pipeline stays one: in training, and in what is saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from helpers.pool import WorkerPool
from helpers.training import small_config, start_engine, train

from biroute.parallel.checkpoint.load import load_checkpoint
from biroute.parallel.checkpoint.meta import TrainingProgress
from biroute.parallel.checkpoint.save import save_checkpoint

Ranks = Callable[[int], WorkerPool]
ABOUT = {"model": {"kind": "test"}}


def tied_job(folder: Path) -> list[torch.Tensor]:
    """This stage's embedding: trained, and trained on from a checkpoint in the middle."""
    parallel = {"pipeline": 2, "data": 4, "zero_stage": 1}
    config = small_config(parallel=parallel, train={"global_batch_size": 16})

    def embedding(engine) -> torch.Tensor:  # type: ignore[no-untyped-def]
        return next(p for name, p in engine.named_parameters() if name.startswith("embedding.")).detach().clone()

    engine = start_engine(config)
    train(engine, range(1, 4))
    save_checkpoint(engine, folder, TrainingProgress(step=3, sequences=0), ABOUT, keep=1)
    train(engine, range(4, 7))
    resumed = start_engine(config)
    assert load_checkpoint(resumed, folder, ABOUT, print) is not None
    train(resumed, range(4, 7))
    return [embedding(engine), embedding(resumed)]


def test_both_copies_of_a_tied_embedding_stay_equal(ranks: Ranks, tmp_path: Path) -> None:
    """With four data ranks a sum depends on its order, which differs between the stages."""
    found = ranks(8).run(tied_job, tmp_path)
    (straight, resumed), *others = found
    for others_straight, others_resumed in others:
        assert torch.equal(others_straight, straight), "the stages' copies part"
        assert torch.equal(others_resumed, resumed)
    assert torch.equal(straight, resumed), "what is saved is not what the run goes on with"
