"""Evaluate every checkpoint of a run, and new ones while it trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from biroute.configs.errors import UsageError
from biroute.launcher.attempts.journal import read_attempts
from biroute.launcher.attempts.run_files import CANCELLED, CHECKPOINTS, SUBMISSION
from biroute.launcher.evaluate.command import Request, evaluate, wanted_metrics
from biroute.launcher.evaluate.ranks import EvaluationRanks
from biroute.launcher.evaluate.results import Evaluation
from biroute.launcher.generate.trained import run_folder
from biroute.launcher.track.evaluations import evaluated
from biroute.launcher.track.sync import is_training
from biroute.parallel.checkpoint.meta import STEP_NAME
from biroute.parallel.checkpoint.survey import Found, survey

_LOOK_SECONDS = 5.0

Say = Callable[[str], None]


def evaluate_all(
    request: Request, *, follow: bool, say: Say, ranks: EvaluationRanks | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> Iterator[Evaluation]:  # fmt: skip
    """Yield the evaluation of each valid checkpoint that has none, oldest first. Collective.

    A checkpoint that is damaged, or that the run removed before it was read, is said and passed over.

    Args:
        request: what to measure; its step is not used.
        follow: wait for new checkpoints until the run ends: until its last attempt has ended and is not queued again.
        say: called with a line about each thing that the user should know.
        ranks: that share the work; rank 0 looks, and the others do what it found. None: this process alone.
        wait: waits so many seconds.

    Raises:
        UsageError: as in `evaluate`, where it concerns every checkpoint; or none is valid.
    """
    run_dir, done, damaged, valid = run_folder(request.model.run), set[int](), set[Path](), 0
    wanted = wanted_metrics(request)
    if wanted is None:
        raise UsageError("--every-checkpoint with --text needs --name, by which results that exist are known")
    ranks = ranks or EvaluationRanks()
    while True:
        ended = ranks.from_first(not _goes_on(run_dir))  # before looking: what was saved until then is seen
        for one in _look(run_dir):
            if one.problem and one.path not in damaged:
                damaged.add(one.path)
                say(f"{one.path}: {one.problem}; passed over")
        for step in ranks.from_first([step for step in _steps(run_dir) if step not in done]):
            done.add(step)
            if ranks.from_first(request.tracking and wanted <= evaluated(run_dir).get(step, {}).keys()):
                valid += 1
                say(f"step {step} has its results already")
                continue
            try:
                found = evaluate(replace(request, model=replace(request.model, step=step)), say, ranks)
            except UsageError as error:
                still_there = ranks.from_first(step in _steps(run_dir))
                if still_there and "damaged checkpoint" not in str(error):
                    raise
                say(f"{error}; passed over")
                continue
            valid += 1
            yield found
        if ended or not follow:
            break
        wait(_LOOK_SECONDS)
    if not valid:
        raise UsageError(f"{run_dir / CHECKPOINTS}: no checkpoint is valid; restore one, or train again")


def _steps(run_dir: Path) -> list[int]:
    return sorted(one.meta.progress.step for one in _look(run_dir) if one.meta is not None and not one.problem)


def _look(run_dir: Path) -> list[Found]:
    """Return the checkpoints that were finished, damaged ones among them."""
    found = survey(run_dir / CHECKPOINTS, deep=False)
    return [one for one in found if STEP_NAME.fullmatch(one.path.name)]


def _goes_on(run_dir: Path) -> bool:
    """Return whether the run trains, or its scheduler starts it again."""
    attempts = read_attempts(run_dir)
    waits = bool(attempts and attempts[-1].decision == "requeue")
    cancelled = (run_dir / SUBMISSION / CANCELLED).exists()  # perhaps while it waited
    return is_training(run_dir, attempts) or (waits and not cancelled)
