"""The folders that checkpoints lie in: names, meta.json, fingerprints, pruning. No torch, no collective."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from biroute.configs.errors import UsageError

FORMAT = 1
META = "meta.json"
PREFIX = "step-"
PARTIAL = ".partial"  # ending of a folder that is being written


class Owner(Protocol):
    """The attempt that writes. An older one may still be running on a lost node, and must publish nothing."""

    @property
    def attempt(self) -> int: ...

    def writing(self) -> AbstractContextManager[None]:
        """Around each change to the list of checkpoints; raises FencedError if another attempt owns the folder."""


def list_checkpoints(directory: Path) -> list[Path]:
    """Finished checkpoints, newest first."""
    found = [path for path in directory.glob(f"{PREFIX}*") if path.is_dir() and not path.name.endswith(PARTIAL)]
    return sorted(found, reverse=True)


def read_meta(path: Path) -> dict[str, Any]:
    """meta.json of the checkpoint `path`.

    Raises:
        UsageError: written in a format that this version does not read.
        OSError, ValueError, KeyError, TypeError: damaged or incomplete.
    """
    meta: dict[str, Any] = json.loads((path / META).read_text(encoding="utf-8"))
    if meta["format"] != FORMAT:
        raise UsageError(f"{path}: checkpoint format {meta['format']}, this BiRoute reads {FORMAT}")
    return meta


def check_same_model(path: Path, saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises UsageError naming each setting in which the checkpoint's model differs from ours."""
    differing = [key for key in sorted({*saved, *ours}) if saved.get(key) != ours.get(key)]
    if differing:
        changes = ", ".join(f"{key}: {saved.get(key)} there, {ours.get(key)} here" for key in differing)
        raise UsageError(
            f"{path}: checkpoint of another model ({changes}); use its settings, or another train.run_dir"
        )


def check_newest(directory: Path, ours: dict[str, Any]) -> None:
    """Before any rank is started: raises UsageError if the newest readable checkpoint is of another model."""
    for path in list_checkpoints(directory):
        try:
            saved = read_meta(path)["about"]["model"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # loading passes over it, too, and says so
        check_same_model(path, saved, ours)
        return


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def sync_folder(path: Path) -> None:
    """Make a rename in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(directory: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints, and what was never finished."""
    for path in [*list_checkpoints(directory)[keep:], *directory.glob(f"{PREFIX}*{PARTIAL}")]:
        shutil.rmtree(path, ignore_errors=True)
