"""A run that diverges ends with status 1 and its cause, and its good checkpoints stay."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from biroute.launcher.attempts.journal import read_attempts

from .conftest import Answer
from .test_train import only_run, points

Command = Callable[..., Answer]


def test_a_run_without_finite_gradients_ends(config_file: Path, run_dir: Path, command: Command) -> None:
    first = command("train", config_file, "train.steps=2", "checkpoint.keep=2")
    assert first.status == 0, first.err
    good = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    answer = command(
        "train", config_file, "optim.learning_rate=1e25", "train.steps=40",
        "optim.min_learning_rate=1e25", "checkpoint.every_steps=1", "checkpoint.keep=2", "optim.max_skipped_steps=4",
        "train.log_every=40",
    )  # fmt: skip
    assert answer.status == 1, answer
    assert "no sound gradient in 4 steps in a row" in answer.err
    assert "OVERFLOW" not in answer.out + answer.err, "the words of BiRoute, not DeepSpeed's"
    assert "is skipped, its gradient is not finite (loss " in answer.out
    assert "Traceback" not in answer.err
    kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert good[-1] in kept, "what was good is still there"
    cause = read_attempts(run_dir)[-1].cause
    assert "no sound gradient in 4 steps in a row" in cause
    run, _ = only_run(run_dir)
    assert run.info.status == "FAILED"
    last = points(run_dir)[-1]
    assert last["step"] == int(re.findall(r"up to step (\d+)", cause)[0]), "the step at which it ends is logged"
    assert last["metrics"]["optim/skipped_steps"] == 4


def test_a_last_step_without_a_finite_gradient_is_no_finish(
    config_file: Path, run_dir: Path, command: Command
) -> None:
    answer = command(
        "train", config_file, "optim.learning_rate=1e25", "optim.min_learning_rate=1e25", "train.steps=5",
        "checkpoint.every_steps=0", "optim.warmup_steps=0",
    )  # fmt: skip
    assert answer.status == 1, answer
    assert "(it is the last one)" in answer.err
    assert only_run(run_dir)[0].info.status == "FAILED"
    assert not list((run_dir / "checkpoints").glob("step-*"))
