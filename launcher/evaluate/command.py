"""The work of `biroute evaluate`: load a checkpoint, measure, record, send."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from biroute.configs.errors import UsageError
from biroute.configs.schema import ModelConfig
from biroute.launcher.evaluate.forward import ForwardModel
from biroute.launcher.evaluate.losses import far_context, mean_losses, score_windows
from biroute.launcher.evaluate.material import Material, heldout_material, text_material
from biroute.launcher.evaluate.results import PREFIX, Evaluation, Section
from biroute.launcher.evaluate.tasks.catalog import TASKS
from biroute.launcher.evaluate.tasks.names import LOSS
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

    def __post_init__(self) -> None:
        if self.stride is not None and not self.texts:
            raise UsageError(
                f"--stride={self.stride} is for --text; held-out sequences are scored as training cuts them"
            )
        if self.name is not None and not self.name.replace("-", "").replace("_", "").isalnum():
            raise UsageError(f"--name={self.name!r} is no name; use letters, digits, - and _")
        for option, value in (("limit", self.limit), ("window", self.window), ("window-tokens", self.window_tokens)):
            if value is not None and value < 1:
                raise UsageError(f"--{option}={value} is out of range; use at least 1")


def evaluate(request: Request, say: Say) -> Evaluation:
    """Evaluate one checkpoint; the results go to the run's log of evaluations and to MLflow.

    Args:
        request: what to measure, on which checkpoint.
        say: called with a line about each thing that the user should know.

    Raises:
        UsageError: as in `open_trained`, or what is to be measured does not fit the model or is not there.
    """
    trained = open_trained(request.model, say)
    window = _window(request.window, trained.config.model)
    material = _material(request, trained, say)
    text = TaskText(trained.tokenizer, material.pieces, trained.config.model.sequence_length)
    for name, problem in _problems(request, text).items():
        raise UsageError(f"--tasks={name}: {problem}; leave it out, or use --check to see what each task needs")
    model = ForwardModel(trained.model.layers, trained.config)
    sections = []
    for name in request.tasks:
        if name == LOSS:
            sections.append(_losses(request, trained, material, model, window))
        else:
            count = request.limit or _QUESTIONS
            sections.append(_named(request, score_task(model, TASKS[name], text, count=count, seed=request.seed)))
    settings = {"precision": request.model.precision, "window": window, "seed": request.seed}
    evaluation = Evaluation(str(trained.checkpoint), trained.meta.progress.step, settings, sections)
    if request.tracking:
        _record(trained, evaluation, say)
    return evaluation


def check(request: Request, say: Say) -> tuple[str, bool]:
    """Say what each task needs and whether the model's length and the text suffice, and measure nothing.

    Returns:
        The lines, and whether all tasks can run.
    """
    trained = open_trained(request.model, say)
    material = _material(request, trained, say)
    length = trained.config.model.sequence_length
    text = TaskText(trained.tokenizer, material.pieces, length)
    problems = _problems(request, text)
    lines = [
        f"{trained.checkpoint}: sequences of {length} tokens; {material.about}; {len(text.words)} words of one token"
    ]
    for name in request.tasks:
        needs = "one token to predict" if name == LOSS else TASKS[name].needs
        lines.append(f"{name}: needs {needs}, nothing from the internet: {problems.get(name, 'it can run')}")
    return "\n".join(lines), not problems


def wanted_metrics(request: Request) -> set[str] | None:
    """Return metrics that a checkpoint has once this request was done; None where the name comes from the text."""
    if LOSS in request.tasks and request.texts and request.name is None:
        return None
    losses = {f"{PREFIX}{request.name or 'heldout'}/loss"}
    tasks = {f"{PREFIX}{_task_name(request, name)}/accuracy" for name in request.tasks if name != LOSS}
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
    found = {name: TASKS[name].problem(text) for name in request.tasks if name != LOSS}
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
