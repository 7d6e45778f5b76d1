"""What tasks of lm-eval need, said before anything is loaded: datasets and metrics, and whether they are here."""

from __future__ import annotations

import difflib
import glob
import os
import socket
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import datasets
import lm_eval.api.metrics  # noqa: F401  fills the registry
from lm_eval.api.registry import metric_registry
from lm_eval.tasks import TaskManager

from biroute.configs.errors import UsageError
from biroute.launcher.evaluate.tasks.names import HARNESS

_FILES = ("json", "csv", "text", "parquet", "arrow", "xml", "pandas")  # formats of `datasets`, not names of datasets
_REACH_SECONDS = 3.0
_LATER = "prepare the cache (HF_HOME) where the internet is reached, or leave the task out"


@dataclass(frozen=True)
class Need:
    """What one task needs.

    Attributes:
        task: its name.
        words: what it needs, and from where.
        problem: why it cannot be had here; "" if it can.
    """

    task: str
    words: str
    problem: str = ""


@cache
def open_tasks(names: tuple[str, ...], include: Path | None) -> TaskManager:
    """Return lm-eval's index of tasks.

    Args:
        names: of tasks, groups or tags; all of lm-eval's own 14,000 are read only if one is not in `include`.
        include: folder of YAML files of tasks; None: lm-eval's own alone.

    Raises:
        UsageError: there is no such folder, or no such task.
    """
    if include is not None and not include.is_dir():
        raise UsageError(f"--lm-eval-include={include} is no folder; name one that holds YAML files of tasks")
    if include is not None:
        manager = TaskManager(include_path=str(include), include_defaults=False)
        if all(_known(manager, name) for name in names):
            return manager
    manager = TaskManager(include_path=str(include) if include is not None else None)
    for name in names:
        if not _known(manager, name):
            near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(f'{HARNESS}{one}' for one in near)}?" if near else (
                "name a task, group or tag of lm-eval, or give yours with --lm-eval-include"
            )  # fmt: skip
            raise UsageError(f"--tasks: lm-eval has no task {name}; {hint}")
    return manager


def needs_of(manager: TaskManager, names: Sequence[str]) -> list[Need]:
    """Return what each task of these tasks, groups and tags needs. One short connection at most; no download."""
    found: dict[str, Need] = {}
    for name in names:
        for task, config in _tasks(manager, name):
            found.setdefault(task, _need(task, config))
    return list(found.values())


def _known(manager: TaskManager, name: str) -> bool:
    """Return whether the index has a name and, where it is a group, all of its members."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    members = (entry.cfg or {}).get("task")
    return not isinstance(members, list) or all(_known(manager, one) for one in members if isinstance(one, str))


def _tasks(manager: TaskManager, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    entry = manager.task_index[name]
    config = entry.cfg or {}
    if entry.yaml_path is None and entry.cfg is None:  # a tag
        for one in sorted(entry.tags):
            yield from _tasks(manager, one)
    elif isinstance(config.get("task"), list):
        for one in config["task"]:
            if isinstance(one, str):
                yield from _tasks(manager, one)
            elif "task" in one and isinstance(one["task"], str):
                base = manager.task_index.get(one["task"])
                yield one["task"], {**((base.cfg if base else None) or {}), **one}
    else:
        yield name, config


def _need(task: str, config: dict[str, Any]) -> Need:
    path, name, options = config.get("dataset_path"), config.get("dataset_name"), config.get("dataset_kwargs") or {}
    if config.get("custom_dataset") is not None:
        need = Need(task, "a dataset that a function of the task makes")
    elif not isinstance(path, str):
        need = Need(task, "what its own code loads")
    elif path in _FILES or Path(path).exists():
        need = _need_of_files(task, path, options)
    else:
        whole = path if name is None else f"{path} ({name})"
        if _cached(path, name):
            need = Need(task, f"the dataset {whole}, which is in the cache")
        elif _reached():
            need = Need(task, f"the dataset {whole}, which is downloaded from the Hugging Face hub")
        else:
            need = Need(
                task, f"the dataset {whole}, from the Hugging Face hub",
                f"it is not in {datasets.config.HF_DATASETS_CACHE}, and the hub is not reached; {_LATER}",
            )  # fmt: skip
    # A task that works its results out itself may call them anything.
    by_itself = config.get("process_results") is not None
    strange = [] if by_itself else [one for one in _metrics(config) if one not in metric_registry]
    if strange and not need.problem and not _reached():
        problem = f"its metric {strange[0]} comes from the Hugging Face hub, which is not reached; leave it out"
        return Need(task, need.words, problem)
    return need


def _need_of_files(task: str, path: str, options: dict[str, Any]) -> Need:
    given = options.get("data_files")
    files = list(given.values()) if isinstance(given, dict) else [given]
    names = [str(one) for part in files if part is not None for one in (part if isinstance(part, list) else [part])]
    if not names:
        return Need(task, f"the folder {path}" if path not in _FILES else f"data of the format {path}")
    base = options.get("data_dir") or "."
    missing = [name for name in names if "://" not in name and not glob.glob(os.path.join(base, name))]
    words = f"the files {', '.join(names)}"
    if missing:
        return Need(
            task, words, f"{missing[0]} does not exist, seen from {Path.cwd()}; correct the task's data_files"
        )
    return Need(task, words)


def _metrics(config: dict[str, Any]) -> Iterator[str]:
    for one in config.get("metric_list") or []:
        metric = one.get("metric") if isinstance(one, dict) else None
        if isinstance(metric, str) and metric.isidentifier():  # a function of the task is a path
            yield metric


def _cached(path: str, name: str | None) -> bool:
    folder = Path(datasets.config.HF_DATASETS_CACHE) / path.replace("/", "___")
    return (folder / (name or "default")).is_dir()


@cache
def _reached() -> bool:
    """Return whether the Hugging Face hub, or the proxy before it, takes a connection."""
    if datasets.config.HF_DATASETS_OFFLINE:
        return False
    address = urlsplit(urllib.request.getproxies().get("https") or datasets.config.HF_ENDPOINT)
    try:
        socket.create_connection((address.hostname or "", address.port or 443), _REACH_SECONDS).close()
    except OSError:
        return False
    return True
