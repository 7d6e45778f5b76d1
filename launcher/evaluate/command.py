"""The work of `biroute evaluate`: load a checkpoint, measure, record, send."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from biroute.configs.errors import UsageError
from biroute.configs.schema import ModelConfig
from biroute.launcher.evaluate.forward import ForwardModel
from biroute.launcher.evaluate.losses import far_context, mean_losses, score_windows
from biroute.launcher.evaluate.material import HELDOUT, Material, heldout_material, text_material
from biroute.launcher.evaluate.ranks import EvaluationRanks
from biroute.launcher.evaluate.results import PREFIX, Evaluation, Section
from biroute.launcher.evaluate.tasks.catalog import TASKS
from biroute.launcher.evaluate.tasks.names import HARNESS, LOSS, harness_names
from biroute.launcher.evaluate.tasks.task import TaskText, score_task
from biroute.launcher.generate.model_choice import ModelChoice
from biroute.launcher.generate.trained import Trained, open_trained
from biroute.launcher.track.evaluations import record_evaluation, send_evaluations

_QUESTIONS = 50  # of each group of a task
_CALL_SECONDS = 60.0  # nothing else waits for MLflow's answers

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What `biroute evaluate` was asked for; the fields are its options."""

    model: ModelChoice
    texts: Sequence[str]
    tasks: Sequence[str]
    limit: int | None = None
    window: int | None = None
    window_tokens: int = 64
    stride: int | None = None
    seed: int = 0
    name: str | None = None
    tracking: bool = True
    include: Path | None = None
    fewshot: int | None = None

    @property
    def own_tasks(self) -> list[str]:
        """Return the tasks that are not lm-eval's."""
        return [name for name in self.tasks if not name.startswith(HARNESS)]

    @property
    def harness_tasks(self) -> tuple[str, ...]:
        """Return lm-eval's tasks, without their prefix."""
        return harness_names(self.tasks)

    def __post_init__(self) -> None:
        self._check_harness()
        if self.stride is not None and not self.texts:
            raise UsageError(
                f"--stride={self.stride} is for --text; held-out sequences are scored as training cuts them"
            )
        if self.name is not None and not self.name.replace("-", "").replace("_", "").isalnum():
            raise UsageError(f"--name={self.name!r} is no name; use letters, digits, - and _")
        for option, value in (("limit", self.limit), ("window", self.window), ("window-tokens", self.window_tokens)):
            if value is not None and value < 1:
                raise UsageError(f"--{option}={value} is out of range; use at least 1")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed={self.seed} is out of range; use from 0 to 2^63 - 1")

    def _check_harness(self) -> None:
        names = self.harness_tasks
        if names and find_spec("lm_eval") is None:
            raise UsageError(
                f"--tasks={HARNESS}{names[0]} needs lm-eval, which is not installed; install it with "
                "`pip install 'biroute[eval]'`"
            )
        if self.fewshot is not None and self.fewshot < 0:
            raise UsageError(f"--fewshot={self.fewshot} is out of range; use at least 0")
        for option, value in (("fewshot", self.fewshot), ("lm-eval-include", self.include)):
            if value is not None and not names:
                raise UsageError(f"--{option}={value} is for tasks of lm-eval; name one, such as {HARNESS}arc_easy")


def evaluate(request: Request, say: Say, ranks: EvaluationRanks | None = None) -> Evaluation:
    """Evaluate one checkpoint; the results go to the run's log of evaluations and to MLflow. Collective.

    Args:
        request: what to measure, on which checkpoint.
        say: called with a line about each thing that the user should know.
        ranks: that share the work, all with the same request; rank 0 writes. None: this process alone.

    Raises:
        UsageError: as in `open_trained`, or what is to be measured does not fit the model or is not there.
    """
    ranks = ranks or EvaluationRanks()
    trained = _open_same(request, say, ranks)
    window, work = ranks.all_or_none(
        lambda: (_window(request.window, trained.config.model), _work(request, trained, say))
    )
    sections = []
    if work.material is not None and work.text is not None:
        model = ForwardModel(trained.model.layers, trained.config, ranks)
        for name in request.own_tasks:
            if name == LOSS:
                sections.append(_losses(request, trained, work.material, model, window))
            else:
                count = request.limit or _QUESTIONS
                section = score_task(model, TASKS[name], work.text, count=count, seed=request.seed)
                sections.append(_named(request, section))
    if request.harness_tasks:
        from biroute.launcher.evaluate.harness.run import score_harness

        found = score_harness(
            trained, work.manager, request.harness_tasks, ranks, limit=request.limit, fewshot=request.fewshot, say=say
        )
        sections += [_named(request, section) for section in found]
    settings = {"precision": request.model.precision, "window": window, "seed": request.seed}
    evaluation = Evaluation(str(trained.checkpoint), trained.meta.progress.step, settings, sections)
    if request.tracking and ranks.rank == 0:
        _record(trained, evaluation, say)
    return evaluation


@dataclass(frozen=True)
class _Work:
    """What is measured on; None where nothing asks for it."""

    material: Material | None
    text: TaskText | None
    manager: Any  # lm-eval's index of tasks


def _open_same(request: Request, say: Say, ranks: EvaluationRanks) -> Trained:
    """Open the same checkpoint on all ranks: where a new one has just come, that which all of them see."""
    trained = ranks.all_or_none(lambda: open_trained(request.model, say))
    steps = ranks.join_items(
        [trained.meta.progress.step if ranks.mine(number) else None for number in range(ranks.size)]
    )
    oldest = replace(request.model, step=min(steps))
    return ranks.all_or_none(
        lambda: trained if trained.meta.progress.step == oldest.step else open_trained(oldest, say)
    )


def _work(request: Request, trained: Trained, say: Say) -> _Work:
    """Read and check everything before anything is measured.

    Raises:
        UsageError: something is missing, or does not fit the model.
    """
    material = text = manager = None
    if request.own_tasks:
        material = _material(request, trained, say)
        text = TaskText(trained.tokenizer, material.pieces, trained.config.model.sequence_length)
        for name, problem in _problems(request, text).items():
            raise UsageError(f"--tasks={name}: {problem}; leave it out, or use --check to see what each task needs")
    if request.harness_tasks:
        from biroute.launcher.evaluate.harness.needs import needs_of, open_tasks

        manager = open_tasks(request.harness_tasks, request.include)
        for need in needs_of(manager, request.harness_tasks):
            if need.problem:
                raise UsageError(f"--tasks={HARNESS}{need.task} needs {need.words}: {need.problem}")
    return _Work(material, text, manager)


def check(request: Request, say: Say) -> tuple[str, bool]:
    """Say what each task needs and whether length, text and datasets suffice, and measure nothing.

    Returns:
        The lines, and whether all tasks can run.
    """
    trained = open_trained(request.model, say)
    length = trained.config.model.sequence_length
    lines, problems = [f"{trained.checkpoint}: sequences of {length} tokens"], dict[str, str]()
    if request.own_tasks:
        material = _material(request, trained, say)
        text = TaskText(trained.tokenizer, material.pieces, length)
        problems = dict(_problems(request, text))
        lines[0] += f"; {material.about}; {len(text.words)} words of one token"
    for name in request.own_tasks:
        needs = "one token to predict" if name == LOSS else TASKS[name].needs
        lines.append(f"{name}: needs {needs}, nothing from the internet: {problems.get(name, 'it can run')}")
    if request.harness_tasks:
        from biroute.launcher.evaluate.harness.needs import needs_of, open_tasks

        for need in needs_of(open_tasks(request.harness_tasks, request.include), request.harness_tasks):
            lines.append(f"{HARNESS}{need.task}: needs {need.words}: {need.problem or 'it can run'}")
            problems |= {need.task: need.problem} if need.problem else {}
    return "\n".join(lines), not problems


def wanted_metrics(request: Request) -> set[str] | None:
    """Return metrics that a checkpoint has once this request was done; None where the name comes from the text."""
    if LOSS in request.tasks and request.texts and request.name is None:
        return None
    losses = {f"{PREFIX}{request.name or HELDOUT}/loss"}
    tasks = {f"{PREFIX}{_task_name(request, name)}/accuracy" for name in request.own_tasks if name != LOSS}
    # lm-eval's metrics are known when a task is loaded; its number of documents is always one.
    tasks |= {f"{PREFIX}{_task_name(request, f'lm_eval/{name}')}/documents" for name in request.harness_tasks}
    return tasks | (losses if LOSS in request.tasks else set())


def _material(request: Request, trained: Trained, say: Say) -> Material:
    limit, name = request.limit, request.name
    if request.texts:
        return text_material(trained, request.texts, stride=request.stride, limit=limit, name=name, say=say)
    return heldout_material(trained, limit=limit, name=name, say=say)


def _window(given: int | None, model: ModelConfig) -> int:
    length, region = model.sequence_length, model.attention.region_size
    if given is not None and given > length:
        raise UsageError(
            f"--window={given} is more than the {length} tokens of the model's sequences; use at most that"
        )
    return min(2 * region, length) if given is None else given


def _problems(request: Request, text: TaskText) -> Mapping[str, str]:
    found = {name: TASKS[name].problem(text) for name in request.own_tasks if name != LOSS}
    return {name: problem for name, problem in found.items() if problem}


def _losses(request: Request, trained: Trained, material: Material, model: ForwardModel, window: int) -> Section:
    losses = score_windows(model, material.windows, trained.tokenizer.token_bytes(), window)
    measures = mean_losses(losses)
    measures |= far_context(model, material.windows, losses, window=window, most=request.window_tokens)
    about = f"{material.about}; local window of {window} tokens"
    unit = f"tokens (bytes for bits_per_byte); errors are over {material.unit}"
    return Section(material.name, about, measures, unit)


def _task_name(request: Request, task: str) -> str:
    """Return the name of a task's results: those of other texts than the held-out ones are others."""
    return task if request.name is None else f"{request.name}-{task}"


def _named(request: Request, section: Section) -> Section:
    return Section(_task_name(request, section.name), section.about, section.measures, section.unit, section.chance)


def _record(trained: Trained, evaluation: Evaluation, say: Say) -> None:
    run_dir = trained.checkpoint.parent.parent
    try:
        record_evaluation(run_dir, evaluation.step, evaluation.metrics(), say)
    except OSError as error:
        say(f"{error.filename or run_dir}: {error.strerror}; the results are not kept in the run folder")
        return
    send_evaluations(run_dir, trained.config, _CALL_SECONDS, say)


def as_dicts(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Return what `--json` prints."""
    return {"evaluations": [one.as_dict() for one in evaluations]}
