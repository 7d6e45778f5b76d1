"""Each checkpoint is evaluated once, also those that come while the run trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from biroute.configs.errors import UsageError
from biroute.launcher.attempts.journal import Attempt
from biroute.launcher.evaluate import follow
from biroute.launcher.evaluate.command import Request
from biroute.launcher.evaluate.results import Evaluation
from biroute.launcher.generate.model_choice import ModelChoice
from biroute.launcher.track.evaluations import record_evaluation


class Run:
    """A run whose checkpoints and attempts the test sets."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.steps: list[int] = []
        self.problems: dict[int, str] = {}
        self.attempts = [Attempt(1, 0.0, ended=1.0, decision="finished")]
        self.training = False
        self.meanwhile: Callable[[int], None] = lambda _: None  # called in each evaluation
        self.said: list[str] = []
        patch.setattr(follow, "run_folder", lambda run: run)
        patch.setattr(follow, "survey", lambda *_, **__: [*map(self._found, reversed(self.steps))])
        patch.setattr(follow, "evaluate", self._evaluate)
        patch.setattr(follow, "read_attempts", lambda _: self.attempts)
        patch.setattr(follow, "is_training", lambda *_: self.training)

    def _found(self, step: int) -> Any:
        meta = SimpleNamespace(progress=SimpleNamespace(step=step))
        problem = "torn" if self.problems.get(step) == "torn" else ""
        return SimpleNamespace(path=Path(f"step-{step:08d}"), meta=meta, problem=problem)

    def _evaluate(self, request: Request, *_: object) -> Evaluation:
        assert request.model.step is not None
        if problem := self.problems.get(request.model.step):
            if problem == "pruned":
                self.steps.remove(request.model.step)
            raise UsageError(problem)
        self.meanwhile(request.model.step)
        record_evaluation(self.folder, request.model.step, {"evaluate/heldout/loss": 1.0}, self.said.append)
        return Evaluation("c", request.model.step, {})

    def all(self, wait: Any = None, **options: Any) -> list[int]:
        request = Request(ModelChoice(self.folder), options.pop("texts", []), ["loss"], **options)
        found = follow.evaluate_all(request, follow=wait is not None, say=self.said.append, wait=wait)
        return [one.step for one in found]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path, monkeypatch)


def test_each_checkpoint_once_oldest_first(run: Run) -> None:
    run.steps = [2, 4]
    assert run.all() == [2, 4]
    run.steps.append(6)
    assert run.all() == [6] and run.said == ["step 2 has its results already", "step 4 has its results already"]
    assert run.all() == []
    assert run.all(name="other") == [2, 4, 6]  # results of another name
    assert run.all(tracking=False) == [2, 4, 6]


def test_following_ends_with_the_run_and_misses_nothing(run: Run) -> None:
    run.training, rounds = True, []

    def wait(_: float) -> None:
        rounds.append(0)
        run.steps.append(10 * len(rounds))
        if len(rounds) == 3:  # the last attempt was stopped, and is queued again
            run.training, run.attempts = False, [Attempt(1, 0.0, ended=1.0, decision="requeue")]
        if len(rounds) == 4:
            run.attempts = [Attempt(1, 0.0, ended=1.0, decision="finished")]

    assert run.all(wait) == [10, 20, 30, 40]


def test_a_checkpoint_that_comes_with_the_end_during_an_evaluation_is_not_missed(run: Run) -> None:
    def last_save(step: int) -> None:
        if step == 2:
            run.steps.append(4)
            run.training = False

    run.training, run.steps, run.meanwhile = True, [2], last_save
    assert run.all(lambda _: None) == [2, 4]


def test_damaged_and_removed_checkpoints_are_passed_over(run: Run) -> None:
    run.steps = [2, 4, 6, 8]
    run.problems = {2: "step-2: damaged checkpoint (bad); use another one", 4: "pruned", 6: "torn"}
    assert run.all() == [8]
    assert run.said == [
        "step-00000006: torn; passed over",
        "step-2: damaged checkpoint (bad); use another one; passed over",
        "pruned; passed over",
    ]
    run.steps = [2]
    with pytest.raises(UsageError, match="checkpoints: no checkpoint is valid"):
        run.all()


def test_what_is_wrong_with_the_request_ends_it(run: Run) -> None:
    run.steps, run.problems = [2, 4], {2: "--window=99 is more than the 32 tokens"}
    with pytest.raises(UsageError, match="--window=99"):
        run.all()
    with pytest.raises(UsageError, match="--every-checkpoint with --text needs --name"):
        run.all(texts=["a.txt"])
