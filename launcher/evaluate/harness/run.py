"""lm-eval's tasks on a trained model: the work of `biroute evaluate --tasks lm_eval:NAME`."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from biroute.configs.errors import UsageError
from biroute.launcher.evaluate.harness.model import HarnessModel
from biroute.launcher.evaluate.measure import Measure
from biroute.launcher.evaluate.ranks import EvaluationRanks
from biroute.launcher.evaluate.results import Section
from biroute.launcher.evaluate.tasks.names import HARNESS
from biroute.launcher.generate.trained import Trained

DOCUMENTS = "documents"  # a measure that every task has
_FEWSHOT_SEED = 1234  # lm-eval's own, so that few-shot examples are those of other people's results
_NO_VERSION = "Yaml"  # what lm-eval says where a task says nothing
_BOOTSTRAPS = 1000  # of the standard errors of metrics that are no means, such as BLEU


def score_harness(
    trained: Trained, manager: TaskManager, names: Sequence[str], ranks: EvaluationRanks, *,
    limit: int | None, fewshot: int | None, say: Callable[[str], None],
) -> list[Section]:  # fmt: skip
    """Run tasks of lm-eval. Collective: all ranks get the same results.

    Args:
        trained: the model.
        manager: knows the tasks.
        names: of tasks, groups or tags.
        ranks: that share the work.
        limit: documents of each task; None: all.
        fewshot: examples before each question; None: as the task says.
        say: called with a line about each thing that the user should know.

    Returns:
        A section for each task and group.

    Raises:
        UsageError: a task cannot be loaded, or does not fit the model.
    """
    model = HarnessModel(trained, ranks, say)
    with _quiet():
        loaded = ranks.all_or_none(lambda: _load(manager, names))
        for task in loaded["tasks"].values():
            given = task.get_config("num_fewshot")
            # A task that says 0 means it: its prompt has no place for examples.
            if given is None or (fewshot is not None and given != 0):
                task.set_config(key="num_fewshot", value=fewshot or 0)
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)
        found = lm_eval.evaluate(
            lm=model, task_dict=loaded, limit=limit, bootstrap_iters=_BOOTSTRAPS, log_samples=False
        )
    sections = {name: _section(name, [name], values, found, model) for name, values in found["results"].items()}
    for name in names:  # a tag has no results of its own, but somebody asks whether it is done
        if name not in sections:
            members = sorted(manager.task_index[name].tags)
            sections[name] = _section(name, members, {}, found, model)
    return list(sections.values())


def _load(manager: TaskManager, names: Sequence[str]) -> Any:
    try:
        return manager.load(list(dict.fromkeys(names)))
    except Exception as error:  # of datasets, huggingface_hub, a task's own functions or its YAML
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        wanted = ", ".join(f"{HARNESS}{name}" for name in names)
        raise UsageError(
            f"--tasks={wanted} cannot be loaded ({first}); `--check` says what each task needs"
        ) from None


def _section(
    name: str, parts: Sequence[str], values: dict[str, Any], found: dict[str, Any], model: HarnessModel
) -> Section:
    members = [one for part in parts for one in _tasks_of(part, found) if one in found["n-samples"]]
    counts = [found["n-samples"][one] for one in members]
    used, there = (sum(one[key] for one in counts) for key in ("effective", "original"))
    about = f"lm-eval {version('lm_eval')}, {used} of {there} documents"
    if (shots := found["n-shot"].get(name)) is not None:
        about += f", {shots}-shot"
    if (number := found["versions"].get(name)) not in (
        None,
        "N/A",
        "Yaml",
    ):  # what lm-eval says where a task says nothing
        about += f", task version {number}"
    for counter, words in (
        (model.cut, "contexts were longer than the model's sequences and lost their beginnings"),
        (
            model.merged,
            "answers are no tokens of their own behind their context and were scored as texts of their own",
        ),
    ):
        if (count := sum(counter[one] for one in members)) > 0:
            about += f"; {count} {words}"
    measures = {}
    for key, value in values.items():
        metric, comma, chain = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{chain}")
        error = float(error) if isinstance(error, int | float) else math.nan
        measures[metric if chain == "none" else f"{metric}/{chain}"] = Measure(float(value), error, used)
    measures[DOCUMENTS] = Measure(float(used), math.nan, used)
    return Section(f"{HARNESS.rstrip(':')}/{name}", about, measures, DOCUMENTS)


def _tasks_of(name: str, found: dict[str, Any]) -> list[str]:
    """Return the tasks of a group in lm-eval's results, those of its groups included, or the task itself."""
    children = found["group_subtasks"].get(name)
    return [name] if not children else [one for child in children for one in _tasks_of(child, found)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's own words off the standard output, which may be JSON, and its bootstraps in this process."""
    logger, variable = logging.getLogger("lm_eval"), "DISABLE_MULTIPROC"
    before, set_before = logger.level, os.environ.get(variable)
    logger.setLevel(logging.ERROR)
    os.environ[variable] = "1"  # a process that is forked from one with torch's threads may hang
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(before)
        if set_before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = set_before
