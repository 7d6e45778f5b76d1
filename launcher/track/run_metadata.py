"""Run metadata for MLflow's parameters and tags: configuration, code, packages, host."""

from __future__ import annotations

import contextlib
import getpass
import json
import platform
import socket
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from biroute.configs.load import flatten
from biroute.configs.schema import RunConfig
from biroute.launcher.attempts.journal import Attempt

REVISION_NAME = "revision.json"  # next to the packages in a code snapshot
PARAMETER_CHARACTERS = 6000  # MLflow's limits for the length of a value
TAG_CHARACTERS = 8000
_PACKAGES = (
    "biroute", "torch", "deepspeed", "megatron-core", "mlflow", "numpy", "sentencepiece", "webdataset",
)  # fmt: skip
# Where and how a run executes may differ between attempts; MLflow's parameters may not.
_PLACEMENT = (
    "parallel.",
    "train.run_dir",
    "train.accept_changes",
    "train.device",
    "train.threads_per_rank",
    "data.dir",
    "data.workers",
    "train.hang_seconds",
    "train.startup_seconds",
    "slurm.",
)


def parameters(config: RunConfig) -> dict[str, str]:
    """Return dotted field -> value of every field that defines the run, cut to MLflow's limit."""
    kept = {name: value for name, value in flatten(config).items() if not name.startswith((*_PLACEMENT, "tracking."))}
    return {name: value[:PARAMETER_CHARACTERS] for name, value in kept.items()}


def placement_tags(config: RunConfig, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return dotted field -> value of the fields that may change between attempts and are not at their default.

    `known` are the tags of earlier attempts: a field among them is returned in any case. Section `tracking` is left
    out, as it may contain a password.
    """
    defaults = flatten(RunConfig())
    return {
        name: value
        for name, value in flatten(config).items()
        if name.startswith(_PLACEMENT) and (value != defaults.get(name) or name in (known or {}))
    }


def chosen_tags(config: RunConfig) -> dict[str, str]:
    """Return the tags that the user chose, and those by which MLflow groups runs."""
    tracking = config.tracking
    tags = dict(tracking.tags)
    if tracking.group:
        tags["group"] = tracking.group
    if tracking.parent:
        tags["mlflow.parentRunId"] = tracking.parent
    return tags


def changed_parameters(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Describe the parameters that differ from those of the first attempt: `train.steps: 100 -> 200; ...`."""
    changes = [
        f"{name}: {before[name]} -> {now[name]}" for name in sorted(now) if before.get(name, now[name]) != now[name]
    ]
    return "; ".join(changes)


def environment_tags() -> dict[str, str]:
    """Return host, user, Python and package versions, and the commit of the code if it runs from a checkout."""
    tags = {
        "host": socket.gethostname(),
        "version.python": platform.python_version(),
        "mlflow.source.name": "biroute",
    }
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    for package in _PACKAGES:
        try:
            tags[f"version.{package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return tags | git_tags(Path(__file__).with_name("__init__.py"))


def attempt_tags(attempts: Sequence[Attempt]) -> dict[str, str]:
    """Return `attempt.0001` -> where the attempt ran and why it ended, for each attempt."""
    tags = {}
    for attempt in attempts:
        where = ", ".join(filter(None, (attempt.job and f"job {attempt.job}", " ".join(attempt.nodes))))
        end = attempt.cause or "running"
        tags[f"attempt.{attempt.number:04d}"] = (f"{end} ({where})" if where else end)[:TAG_CHARACTERS]
    return tags


def git_tags(code_file: Path) -> dict[str, str]:
    """Return commit and dirty flag of the checkout that `code_file` is in or was copied from; empty without one."""
    revision = code_file.resolve().parents[1] / REVISION_NAME
    if revision.is_file():
        with contextlib.suppress(OSError, ValueError):
            return {str(name): str(value) for name, value in json.loads(revision.read_text("utf-8")).items()}
    # --error-unmatch: an installed copy may be in a virtual environment inside an unrelated checkout.
    if _git(code_file, "ls-files", "--error-unmatch", code_file.name) is None:
        return {}
    commit = _git(code_file, "rev-parse", "HEAD")
    changes = _git(code_file, "status", "--porcelain")  # a new module counts as a change too
    if commit is None or changes is None:
        return {}
    dirty = "true" if changes else "false"
    return {"git.commit": commit, "git.dirty": dirty, "mlflow.source.git.commit": commit}


def _git(code_file: Path, *arguments: str) -> str | None:
    # --no-optional-locks: `status` must not take the index lock that a git command of the user may need.
    command = ["git", "--no-optional-locks", "-C", str(code_file.resolve().parent), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
